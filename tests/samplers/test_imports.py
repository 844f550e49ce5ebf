import subprocess
import sys

OUTSIDE = ("diffusers", "distill", "tools", "pydantic", "jsonargparse", "accelerate", "transformers", "cleanfid")


def test_a_fresh_import_of_samplers_loads_no_other_package() -> None:
    program = f"import samplers, sys; print([name for name in {OUTSIDE!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_exists_and_there_are_at_most_forty_five() -> None:
    import samplers

    assert all(hasattr(samplers, name) for name in samplers.__all__)
    assert len(samplers.__all__) == len(set(samplers.__all__)) <= 45
