"""The model cards (README.md) of exported folders: what was distilled and how, and the exact call that runs it."""

import json
from collections.abc import Iterator
from typing import Any

from distill.config import Teach, Train
from distill.folders import class_count
from distill.sections import Optimizer
from distill.student_run import StudentRun
from samplers.adapters import FlowMatching
from samplers.prompts import PIPELINES

# Their loops give the generator to the first noise only; what is added between steps is torch's global noise.
_GLOBAL_NOISE = ("DiTPipeline", "FluxPipeline", "StableDiffusion3Pipeline")
_TEXTS = ("text_encoder", "tokenizer")
_UNWORDED = "unconditional-image-generation"  # the hub's tag of models of classes, too


def _header(task: str, base: str | None = None) -> str:
    known = "" if base is None else f"base_model: {base}\n"
    return f"---\nlibrary_name: diffusers\npipeline_tag: {task}\n{known}---\n\n"


def teacher_card(config: Teach, classes: list[str]) -> str:
    """The card of a teacher."""
    source = "scikit-learn's 8x8 digits (training half)" if config.data.name == "digits" else "a folder of images"
    labels = f"\nClasses, by label: {', '.join(classes)}; label {len(classes)} is the null label.\n" if classes else ""
    repeated = f" % {len(classes)}" if len(classes) < 10 else ""
    cond = f", torch.arange(10){repeated}" if classes else ""
    return (
        _header(_UNWORDED)
        + f"""# An EDM denoiser

A `UNet2DModel` trained for {config.steps} updates of {config.batch_size} images on {source}: D(x, sigma) for sigma in
[{config.sigma_min}, {config.sigma_max}], data of standard deviation {config.sigma_data}.
{labels}
The scheduler file records the coordinates (Karras scalings with D(x, {config.sigma_min}) = x, timestep 250 ln sigma).
This is a denoiser, not a consistency model: the stock pipeline's few-step loop does not sample from it well. Sample it
with an ODE solver:

```python
import torch
from diffusers import ConsistencyModelPipeline
from samplers import denoiser_from, heun, karras_sigmas, sample

pipe = ConsistencyModelPipeline.from_pretrained("FOLDER")
denoiser = denoiser_from(pipe.unet, pipe.scheduler)
sigmas = karras_sigmas(18, denoiser.sigma_min, denoiser.sigma_max)
x = sigmas[0] * torch.randn(10, *({config.data.channels}, {config.data.size}, {config.data.size}))
images = sample(heun, denoiser, x.float(), sigmas{cond})  # in [-1, 1]
```
"""
    )


def student_card(student: StudentRun, index: dict[str, Any]) -> str:
    """The card of a student's pipeline folder. index: the model_index.json of that folder."""
    name = student.steps.pipeline
    options = _left_out(index)
    loading = f"""from diffusers import {name}

pipe = {name}.from_pretrained("FOLDER"{options})"""
    return _card(student, loading)


def _left_out(index: dict[str, Any]) -> str:
    """What from_pretrained is told of text encoders that a pipeline does without."""
    missing = [part for part, entry in index.items() if part.startswith(_TEXTS) and entry[0] is None]
    return "".join(f", {part}=None" for part in missing)


def lora_card(student: StudentRun, file: str) -> str:
    """The card of a student's adapters, which are in `file`."""
    name, scheduler, base = student.index["_class_name"], type(student.steps.scheduler).__name__, student.hub_id
    options = _left_out(student.index)
    peft, loading = "", 'pipe.load_lora_weights("FOLDER")'
    if file.startswith("adapter"):
        peft, loading = (
            "from peft import PeftModel\n",
            f'pipe.{student.part} = PeftModel.from_pretrained(pipe.{student.part}, "FOLDER").merge_and_unload()',
        )
    if student.in_pixels:
        name = student.steps.pipeline
    return _card(
        student,
        f"""from diffusers import {name}, {scheduler}
{peft}
pipe = {name}.from_pretrained("{base or "BASE"}"{options})
pipe.scheduler = {scheduler}.from_pretrained("FOLDER", subfolder="scheduler")
{loading}""",
    )


def _card(student: StudentRun, loading: str) -> str:
    n, base = len(student.steps), student.hub_id
    name = "A one-step student" if n == 1 else f"A student of {n} steps"
    task = "text-to-image" if _has_words(student) else _UNWORDED
    sections = (
        f"# {name}\n\nDistilled from {_origin(student)} by {_method(student.config)}.",
        f"## How to run\n\n```python\n{loading}\n{_call(student)}\n```\n\n{_exactness(student)}",
        _labels(student),
        f"## How it was made\n\n{_table(_settings(student))}",
        _evaluation(student),
        f"What the licence of {base or 'the base model'} says of derived works holds for this one." if base else "",
    )
    return _header(task, base) + "\n\n".join(section for section in sections if section) + "\n"


def _origin(student: StudentRun) -> str:
    """The teacher, as far as others know it: where it lay on a disk is nobody's business."""
    base, kind = student.hub_id, student.index["_class_name"]
    return f"a `{kind}`" if base is None else f"[{base}](https://huggingface.co/{base}), a `{kind}`"


def _method(config: Train) -> str:
    """The method in the names of its papers."""
    choice, target = config.divergence, config.target
    if choice.constant:
        name = "distribution matching (reverse KL)"
    else:
        of = choice.name if choice.exponent is None else f"{choice.name}({choice.exponent:g})"
        name = f"f-divergence distribution matching (f-distill), divergence {of}"
    if config.adversarial_weight:
        name += f", with an adversarial term of weight {config.adversarial_weight:g}"
    if target.name != "fixed":
        name += f", along a path back from a degraded teacher (DisBack, {target.name})"
    return name


def _call(student: StudentRun) -> str:
    """The pipeline's call that takes the student's steps."""
    arguments = [f"{name}={value!r}" for name, value in student.call.items()]
    if _has_words(student):
        return "image = pipe(" + ", ".join(['"a red fox"', *arguments]) + ").images[0]"
    if student.index["_class_name"] == "DiTPipeline":
        labels = [label for label in (207, 360) if label < student.network["num_embeds_ada_norm"]] or [0]
        return f"images = pipe({', '.join([f'class_labels={labels}', *arguments])}).images"
    count = class_count(student.facts, student.network.get("num_class_embeds"))
    labels = [] if count is None else list(range(min(4, count)))
    given = [f"batch_size={len(labels) or 4}", *([f"class_labels={labels}"] if labels else [])]
    return f"images = pipe({', '.join([*given, *arguments])}).images"


def _exactness(student: StudentRun) -> str:
    steps = student.steps
    levels = ", ".join("infinity" if sigma >= FlowMatching.sigma_limit else f"{sigma:.6g}" for sigma in steps.sigmas)
    words = [
        f"`{steps.pipeline}` with the `{type(steps.scheduler).__name__}` in this folder takes exactly the student's "
        f"step{'s' if len(steps) > 1 else ''}, at the noise level{'s' if len(steps) > 1 else ''} {levels} (noise over "
        "signal). The student was trained there only: other schedulers and other numbers of steps mean nothing."
    ]
    if "guidance_scale" in steps.call:
        fed = "is what its network is fed" if steps.call["guidance_scale"] != 1 else "is no guidance"
        words.append(
            f"`guidance_scale={steps.call['guidance_scale']:g}` {fed}: the teacher's guidance is in the weights."
        )
    if len(steps) > 1 and steps.pipeline in _GLOBAL_NOISE:
        words.append(
            "The pipeline draws the noise between steps from torch's global generator: for the same pictures again, "
            "call `torch.manual_seed` besides giving a `generator`."
        )
    return "\n".join(words)


def _labels(student: StudentRun) -> str:
    classes = _classes(student)
    return f"Classes, by label: {', '.join(classes)}." if classes else ""


def _settings(student: StudentRun) -> dict[str, str]:
    config, lora = student.config, student.config.student.lora
    teacher = config.teacher
    guidance = f"{teacher.guidance:g}" if teacher.guidance != 1 else "none"
    if teacher.guidance != 1 and teacher.guidance_interval is not None:
        guidance += " between noise levels {:g} and {:g}".format(*teacher.guidance_interval)
    if teacher.negative_prompt:
        guidance += f", away from {teacher.negative_prompt!r}"
    real = {"none": "none", "data": "images", "encoded": "latents of images", "teacher": "samples of the teacher"}
    rows = {
        "Updates of the student": f"{_step(student)} of {config.steps}, of {config.batch_size} samples",
        "Updates of the fake score for each": str(config.fake.steps),
        "Optimiser of the student": _optimizer(config.student.optimizer),
        "Optimiser of the fake score": _optimizer(config.fake.optimizer),
        "Average of the weights": f"decay {config.student.ema:g}; it is what is here",
        "Teacher's guidance": guidance,
        "Target": config.target.name,
        "Real samples": real[config.real.name],
        "Weighting": config.noise.weighting,
        "Seed": str(config.seed),
    }
    if lora.rank is not None:
        rows["Adapters"] = f"rank {lora.rank}, alpha {lora.alpha or lora.rank:g}"
    return rows


def _optimizer(optimizer: Optimizer) -> str:
    betas = ", ".join(f"{beta:g}" for beta in optimizer.betas)
    return f"AdamW, learning rate {optimizer.lr:g}, betas ({betas}), {optimizer.schedule}"


def _step(student: StudentRun) -> int:
    return int(student.checkpoint.name.rpartition("-")[2])


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _evaluation(student: StudentRun) -> str:
    """The results of distill-fid that lie in a run's folder, as evaluation*.json and *.jsonl; "" without any.

    Of many snapshots, those of the step that is exported are told, or of the last one. Raises ValueError, naming the
    file, for what holds no results.
    """
    run, results = student.folder, []
    for file in sorted((*run.glob("evaluation*.json"), *run.glob("evaluation*.jsonl"))):
        texts = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        try:
            found = [json.loads(text) for text in texts if text.strip()]
            results += [(result.get("step"), row) for result in found for row in _rows(result)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: holds no results of distill-fid ({error})") from error
    if not results:
        return ""
    judged = {step for step, _ in results if step is not None}
    step = _step(student) if _step(student) in judged else max(judged, default=None)
    told, other = (None, step), ""
    if step not in (None, _step(student)):
        other = f" Rows named by a step are of the average after {step} updates; here is that after {_step(student)}."
    lines = (
        "## Evaluation\n",
        "By `distill-fid`; in parentheses, intervals of 95 %, around the value without its bias where that is known."
        f"{other}\n",
        "| of | features | metric | value | samples |",
        "| --- | --- | --- | --- | --- |",
        *(row for step, row in results if step in told),
    )
    return "\n".join(lines)


def _rows(result: dict[str, Any]) -> Iterator[str]:
    for space, metrics in result["values"].items():
        for metric, value in metrics.items():
            interval = value.get("interval")
            spread = "" if interval is None else " ({:.4g} to {:.4g})".format(*interval)
            yield f"| {result['name']} | {space} | {metric} | {value['value']:.4g}{spread} | {result['n']} |"


def _classes(student: StudentRun) -> list[str]:
    return list(student.facts.get("classes", []))


def _has_labels(student: StudentRun) -> bool:
    labels = (student.network.get(name) for name in ("num_class_embeds", "num_embeds_ada_norm"))
    return bool(_classes(student)) or (not _has_words(student) and any(count is not None for count in labels))


def _has_words(student: StudentRun) -> bool:
    kind = PIPELINES.get(student.index["_class_name"])
    return kind is not None and bool(kind.embeddings)
