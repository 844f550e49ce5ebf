"""The model cards (README.md) of exported folders."""

from distill.config import Teach, Train

_HEADER = """---
library_name: diffusers
pipeline_tag: {task}
---

"""


def _task(classes: list[str]) -> str:
    return "unconditional-image-generation" if not classes else "image-generation"


def teacher_card(config: Teach, classes: list[str]) -> str:
    """The card of a teacher."""
    source = "scikit-learn's 8x8 digits (training half)" if config.data.name == "digits" else "a folder of images"
    labels = f"\nClasses, by label: {', '.join(classes)}; label {len(classes)} is the null label.\n" if classes else ""
    return (
        _HEADER.format(task=_task(classes))
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
images = sample(heun, denoiser, x.float(), sigmas{", torch.arange(10)" if classes else ""})  # in [-1, 1]
```
"""
    )


def student_card(config: Train, classes: list[str]) -> str:
    """The card of a one-step student."""
    labels = "class_labels=[0, 1, 2, 3], " if classes else ""
    named = f"\nClasses, by label: {', '.join(classes)}.\n" if classes else ""
    return (
        _HEADER.format(task=_task(classes))
        + f"""# A one-step student

Distilled by distribution matching in {config.steps} updates of {config.batch_size} samples.
Divergence: {_divergence(config)}; target: {config.target.name}. One evaluation makes an image from noise:

```python
from diffusers import ConsistencyModelPipeline

pipe = ConsistencyModelPipeline.from_pretrained("FOLDER")
images = pipe(batch_size=4, {labels}num_inference_steps=1).images
```

`ConsistencyModelPipeline` with `CMStochasticIterativeScheduler` is exact for this student: its one step from
sigma_max = {config.student.sigma_init} (the student's sigma_init) returns D(sigma_max z, sigma_max), because
`clip_denoised` is off. More steps mean nothing: the student was trained at this noise level only.
{named}"""
    )


def _divergence(config: Train) -> str:
    choice = config.divergence
    name = choice.name if choice.exponent is None else f"{choice.name}({choice.exponent:g})"
    if not config.adversarial_weight:
        return name
    return f"{name}, with an adversarial term of weight {config.adversarial_weight:g}"
