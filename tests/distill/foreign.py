"""Stock pipelines of diffusers in processes where this library does not exist: a program, started by `Foreign`.

The program imports diffusers once, offline, and computes nothing; each job is done in a fork of its own, with what a
line of JSON says: {folder, load, call, seed, out, one_step, lora}. What the pipeline makes is saved to `out` as numpy.
"""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np


class Foreign:
    """The program, at work; `pictures` is a job for it."""

    def __init__(self) -> None:
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._program = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def pictures(
        self,
        folder: Path,
        call: dict[str, Any],
        *,
        load: dict[str, Any] | None = None,
        seed: int = 3,
        one_step: dict[str, Any] | None = None,
        lora: tuple[Path, Path] | None = None,
    ) -> np.ndarray:
        """What the pipeline in `folder` makes: [B, H, W, 3] in [0, 1], or latents where the call says so.

        one_step: settings of the scheduler with which a teacher makes its one-step prediction; `timestep` is where.
        lora: a teacher, whose network takes the place of the pipeline's own, and a folder with a LoRA file for it.
        """
        out = folder.parent / f".{folder.name}.npy"
        job = {"folder": str(folder), "call": call, "load": load or {}, "seed": seed, "out": str(out)}
        job |= {"one_step": one_step, "lora": None if lora is None else [str(part) for part in lora]}
        stdin, stdout = self._program.stdin, self._program.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        assert answer == "", answer
        made: np.ndarray = np.load(out)
        out.unlink()
        return made

    def end(self) -> None:
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait(timeout=30)


class Refuse:
    """Finds none of our packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in ("distill", "samplers", "tools", "tests"):
            raise ModuleNotFoundError(name)


def _one_step(pipe: Any, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A teacher with a stock scheduler of which a single step is the prediction of x0; arguments of its call."""
    import diffusers

    name, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    timestep = settings.pop("timestep", None)
    if name.startswith("FlowMatch"):
        pipe.scheduler = type(pipe.scheduler).from_config(config, use_dynamic_shifting=False, shift=1.0)
        return pipe, {} if timestep is None else {"sigmas": [timestep]}
    if name.startswith(("EDM", "CM")):
        pipe.scheduler = type(pipe.scheduler).from_config(config, **settings)
        return pipe, {}
    if timestep is None:
        settings = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config, **settings)
        return pipe, {}
    scheduler = diffusers.DDPMScheduler.from_config(config, variance_type="fixed_small", clip_sample=False)
    return diffusers.ConsistencyModelPipeline(pipe.unet, scheduler), {
        "timesteps": [timestep],
        "num_inference_steps": None,
    }


def _work(job: dict[str, Any]) -> None:
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    pipe, more = DiffusionPipeline.from_pretrained(job["folder"], use_safetensors=True, **job["load"]), {}
    if job["one_step"] is not None:
        pipe, more = _one_step(pipe, job["one_step"])
    if job["lora"] is not None:
        base, folder = job["lora"]
        teacher = DiffusionPipeline.from_pretrained(base, use_safetensors=True, **job["load"])
        part = "unet" if hasattr(teacher, "unet") else "transformer"
        pipe.register_modules(**{part: getattr(teacher, part)})
        pipe.load_lora_weights(folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(job["seed"])  # DiT's scheduler is not given the generator
    generator = torch.Generator().manual_seed(job["seed"])
    made = pipe(generator=generator, **{"output_type": "np", "num_inference_steps": 1} | job["call"] | more).images
    if job["call"].get("output_type") == "latent" and hasattr(pipe, "_unpack_latents"):  # Flux's are a sequence
        size = (job["call"][side] for side in ("height", "width"))
        made = pipe._unpack_latents(made, *size, pipe.vae_scale_factor)
    np.save(job["out"], made if isinstance(made, np.ndarray) else made.detach().numpy())


def _main() -> None:
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer
    try:
        import distill  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("distill could be imported")
    import diffusers
    import transformers

    _ = diffusers.DiffusionPipeline, transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel
    for line in sys.stdin:
        job = json.loads(line)
        answer = Path(job["out"] + ".error")
        child = os.fork()
        if child == 0:
            try:
                _work(job)
            except BaseException:
                answer.write_text(traceback.format_exc())
            os._exit(0)
        os.waitpid(child, 0)
        text = answer.read_text() if answer.exists() else "" if Path(job["out"]).exists() else "the process died"
        answer.unlink(missing_ok=True)
        answers.write(json.dumps(text) + "\n")


if __name__ == "__main__":
    _main()
