"""What an exported folder holds: the parts of the base, a card whose program runs, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distill.export import export_lora, export_student
from distill.student_run import merged
from tests.distill import families
from tests.distill.student_runs import save_run

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def program(folder: Path, base: Path | None = None) -> dict[str, Any]:
    """Runs the program of a card, as it stands but for the names of the folders; what it has defined."""
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))).replace('"BASE"', repr(str(base))), names)
    return names


@pytest.mark.parametrize(
    ("name", "steps", "rank"),
    [
        ("edm-classes", 1, None),
        ("sd15", 4, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                *((name, 1, None) for name in families.FAMILIES),
                *((name, 2, 2) for name in ("sdxl", "sd3-no-t5", "flux", "dit", "edm-classes")),
            )
        ),
    ],
)
def test_the_program_of_a_card_runs(name: str, steps: int, rank: int | None, tmp_path: Path) -> None:
    save_run(name, tmp_path, rank=rank, steps=steps)
    export_student(tmp_path / "run", tmp_path / "exported")
    names = program(tmp_path / "exported")
    assert "image" in names or len(names["images"]) in (2, 4)
    text = (tmp_path / "exported/README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    words = name in families.PROMPTED
    assert header["pipeline_tag"] == ("text-to-image" if words else "unconditional-image-generation")
    assert header["library_name"] == "diffusers"
    if rank is not None and name != "sd3-no-t5":  # whose base has to be loaded without its T5
        export_lora(tmp_path / "run", tmp_path / "lora")
        assert {"image", "images"} & program(tmp_path / "lora", tmp_path / "teacher").keys()


def test_a_card_says_what_was_done_and_what_was_measured(tmp_path: Path) -> None:
    save_run("sd15", tmp_path, steps=2)
    record = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    record["teacher"] |= {"path": "someone/a-model", "guidance": 3.0, "guidance_interval": [0.5, 5.0]}
    record["target"]["name"], record["divergence"]["name"], record["real"]["name"] = "nodes", "jeffreys", "teacher"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(record))
    (tmp_path / "run/network/teacher.id").write_text("someone/a-model")
    value = {"value": 12.345, "standard_error": 0.1, "debiased": None, "interval": [12.1, 12.6]}
    line = {"name": "step-7", "step": 7, "n": 500, "values": {"inception": {"fid": value, "kid": {"value": 0.01}}}}
    lines = (
        line | {"name": "step-6", "step": 6},
        line,
        {key: line[key] for key in line if key != "step"} | {"name": "by hand"},
    )
    (tmp_path / "run/evaluation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "teacher")
    text = (tmp_path / "exported/README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "someone/a-model"
    for said in (
        "f-distill), divergence jeffreys, along a path back from a degraded teacher (DisBack, nodes)",
        "| Teacher's guidance | 3 between noise levels 0.5 and 5 |",
        "| Updates of the student | 7 of 400, of 128 samples |",
        "| step-7 | inception | fid | 12.35 (12.1 to 12.6) | 500 |",
        "| by hand | inception | kid | 0.01 | 500 |",
        'pipe("a red fox", num_inference_steps=2, guidance_scale=1.0).images[0]',
    ):
        assert said in text
    assert "step-6" not in text  # another than the one that is exported
    assert "here is that after" not in text

    (tmp_path / "run/evaluation.jsonl").write_text(json.dumps(lines[0]) + "\n")
    (tmp_path / "run/network/teacher.id").unlink()  # the teacher was a folder of that name
    export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "teacher")
    text = (tmp_path / "exported/README.md").read_text()
    assert "someone" not in text
    assert "Rows named by a step are of the average after 6 updates; here is that after 7." in text
    (tmp_path / "run/evaluation.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"evaluation\.jsonl: holds no results of distill-fid"):
        export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "teacher")


def test_the_parts_of_the_base_are_copied(tmp_path: Path) -> None:
    """File by file; weights that need unpickling or are of a variant are not; a safety checker of such is left out."""
    save_run("sd15", tmp_path)
    teacher, exported = tmp_path / "teacher", tmp_path / "exported"
    (teacher / "vae/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (teacher / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    (teacher / "safety_checker").mkdir()
    (teacher / "safety_checker/pytorch_model.bin").write_bytes(b"pickle")
    index = json.loads((teacher / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (teacher / "model_index.json").write_text(json.dumps(index))
    export_student(tmp_path / "run", exported)
    names = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    kept = {str(file.relative_to(teacher)) for file in teacher.rglob("*") if file.is_file()}
    kept = {name for name in kept if not name.endswith((".bin", ".fp16.safetensors"))}
    assert names == kept | {"README.md", "distill.json"}
    for name in names - {"README.md", "distill.json", "model_index.json"}:
        if not name.startswith(("unet", "scheduler")):
            assert (exported / name).read_bytes() == (teacher / name).read_bytes()
    written = json.loads((exported / "model_index.json").read_text())
    assert written == index | {"safety_checker": [None, None], "scheduler": ["diffusers", "LCMScheduler"]}
    export_student(tmp_path / "run", exported)  # in its place

    (teacher / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"teacher/vae: has no safetensors \(without a variant\)"):
        export_student(tmp_path / "run", exported)
    assert {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()} == names


def test_a_base_that_is_not_the_teachers_is_refused(tmp_path: Path) -> None:
    save_run("sd15", tmp_path, rank=2)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"`distill export --base` names it where it is now"):
        export_student(tmp_path / "run", tmp_path / "exported")
    families.save("sd21", tmp_path / "sd21")
    with pytest.raises(ValueError, match=r"--base: .*sd21/unet is not the network of the teacher"):
        export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "sd21")
    families.save("dit", tmp_path / "dit")
    with pytest.raises(ValueError, match=r"--base: .*dit is a DiTPipeline; needed is the teacher's pipeline"):
        export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "dit")

    from distill.checkpoint import sha256

    file = tmp_path / "moved/unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "run/network/teacher.sha256").write_text(sha256(file))
    export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "moved")
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"moved/unet are not what the adapters were trained on"):
        export_student(tmp_path / "run", tmp_path / "exported", tmp_path / "moved")


def test_whole_students_have_no_adapters(tmp_path: Path) -> None:
    save_run("edm", tmp_path)
    with pytest.raises(ValueError, match="its student has no adapters"):
        export_lora(tmp_path / "run", tmp_path / "lora")
    export_student(tmp_path / "run", tmp_path / "exported")
    with pytest.raises(ValueError, match="holds a pipeline that is no student adapters"):
        export_lora(tmp_path / "run", tmp_path / "exported")


def test_merged_by_hand() -> None:
    """W + s B A, for a linear layer and for a convolution, where A has the kernel and B is 1 x 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {"a.weight": torch.randn((3, 4), generator=generator), "b.weight": torch.randn((3, 2, 3, 3))}
    inner = torch.randn((2, 4), generator=generator), torch.randn((2, 2, 3, 3), generator=generator)
    outer = torch.randn((3, 2), generator=generator), torch.randn((3, 2, 1, 1), generator=generator)
    adapters = {}
    for k, layer in enumerate("ab"):
        adapters[f"{layer}.lora_A.default.weight"] = inner[k]
        adapters[f"{layer}.lora_B.default.weight"] = outer[k]
    found = merged(weights, adapters, 0.5)
    assert torch.allclose(found["a.weight"], weights["a.weight"] + 0.5 * outer[0] @ inner[0])
    x = torch.randn((1, 2, 5, 5), generator=generator)
    conv = torch.nn.functional.conv2d
    both = conv(x, weights["b.weight"]) + 0.5 * conv(conv(x, inner[1]), outer[1])
    assert torch.allclose(conv(x, found["b.weight"]), both, atol=1e-5)
    with pytest.raises(ValueError, match="adapter of a, which is no layer"):
        merged({"b.weight": weights["b.weight"]}, adapters, 1.0)


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_checkpoint_that_was_harmed_is_not_exported(harm: str, tmp_path: Path) -> None:
    """Where it is named itself, as a snapshot is; of a run, the newest whole one would be taken."""
    save_run("edm", tmp_path)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    file = checkpoint / "average.safetensors"
    content = bytearray(file.read_bytes())
    if harm == "cut":
        del content[200:]
    else:
        content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not whole, or not what was written \(state\.json"):
        export_student(checkpoint, tmp_path / "exported")
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        export_student(tmp_path / "run", tmp_path / "exported")
