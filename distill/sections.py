"""The parts of an experiment's configuration: frozen, strict, with their ranges, and free of torch.

`distill.config` puts them together.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Scale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SolverName = Literal["euler", "heun", "ancestral", "dpmpp_2m"]
TargetName = Literal["guided", "annealed", "product", "reward"]
ToyName = Literal["two-modes", "ring", "grid"]


class Section(BaseModel):
    """A part of a configuration: no unknown keys, no changes after it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    """Training images."""

    name: Literal["digits", "folder"] = Field("digits", description="the embedded 8x8 digits, or a folder of images")
    path: str | None = Field(None, description="the folder, for name: folder; sub-folders are classes")
    size: Annotated[int, Field(ge=4, multiple_of=4)] = Field(8, description="height and width in pixels")
    channels: Literal[1, 3] = Field(1, description="1 (grey) or 3 (RGB)")

    @model_validator(mode="after")
    def _path_fits_name(self) -> Self:
        if (self.path is not None) != (self.name == "folder"):
            raise ValueError(f"path: {self.path!r} does not go with name: {self.name} (only a folder has a path)")
        if self.name == "digits" and (self.size, self.channels) != (8, 1):
            raise ValueError(f"size, channels: {self.size}, {self.channels}; the digits are 8x8 and have 1 channel")
        return self


class EncodedImages(Section):
    """Images to encode; their sub-folders are classes, or they have captions (`distill.captions`)."""

    name: Literal["none", "folder"] = Field("none", description="no images, or a folder of them")
    path: str | None = Field(None, description="the folder, for name: folder")
    size: Annotated[int, Field(ge=8)] = Field(512, description="height and width in pixels, cropped in the middle")

    @model_validator(mode="after")
    def _path_fits_name(self) -> Self:
        if (self.path is not None) != (self.name == "folder"):
            raise ValueError(f"path: {self.path!r} does not go with name: {self.name} (only a folder has a path)")
        return self


class Network(Section):
    """A diffusers UNet2DModel."""

    channels: Annotated[tuple[int, ...], Field(min_length=1)] = Field(
        (32, 64), description="width at each resolution; every level after the first halves the size"
    )
    layers: Count = Field(1, description="residual blocks at each level")
    attention: Annotated[tuple[int, ...], Field()] = Field((), description="levels with self-attention, from 0")
    dropout: Fraction = Field(0.0, description="dropout inside the residual blocks")

    @model_validator(mode="after")
    def _levels_exist(self) -> Self:
        if any(width < 8 or width % 8 for width in self.channels):
            raise ValueError(f"channels: {list(self.channels)} are not multiples of 8")
        if any(not 0 <= level < len(self.channels) for level in self.attention):
            raise ValueError(f"attention: {list(self.attention)} are not levels in 0 .. {len(self.channels) - 1}")
        return self


class Optimizer(Section):
    """AdamW with a learning rate that warms up, then follows its schedule to the last step."""

    lr: Positive = Field(1e-3, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), description="decay of the two moments")
    weight_decay: Scale = Field(0.0, description="decoupled weight decay")
    schedule: Literal["constant", "cosine", "drop"] = Field("cosine", description="after the warm-up")
    drop_at: Fraction = Field(0.75, description="for drop: the share of the steps after which the rate falls, once")
    drop_to: Positive = Field(0.25, description="for drop: by this factor")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up")
    clip: Positive | None = Field(None, description="largest norm of the gradient; null is no clipping")


class LogNormal(Section):
    """Noise levels: ln sigma ~ N(mean, std^2), kept inside the denoiser's range (Karras et al. 2022)."""

    mean: Annotated[float, Field(allow_inf_nan=False)] = Field(-1.2, description="mean of ln sigma")
    std: Positive = Field(1.2, description="standard deviation of ln sigma")


class Logging(Section):
    """What a run writes, in steps. None of it changes the result."""

    log_every: Count = Field(10, description="between lines of metrics.jsonl")
    sample_every: Count = Field(100, description="between grids of samples and training curves")
    checkpoint_every: Count = Field(100, description="between checkpoints; the last two are kept")
    mismatch_every: Count | None = Field(
        None,
        description="for train: between measurements of the mismatch to target and teacher (a student of "
        "one step: and of the fake score's error); null is none",
    )
    keep_every: Count | None = Field(
        None, description="for train: between averages of the weights that stay, for a separate job to evaluate"
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="where metrics go besides")


class Toy(Section):
    """The networks of a toy. Where its teacher is exact, the student starts as x = spread z."""

    hidden: Count = Field(64, description="width of the layers")
    layers: Count = Field(3, description="residual layers")
    spread: Positive = Field(1.0, description="standard deviation of the first student's samples")
    affine: bool = Field(False, description="keep the student x = m + s z, so that its law is Gaussian")


class TeacherSource(Section):
    """What is distilled: a diffusion model, or a mixture of Gaussians."""

    name: Literal["pipeline", "two-modes", "ring", "grid"] = Field(
        "pipeline", description="a diffusers model; or a toy: 2 modes on a line, 8 on a ring, 5 x 5 on a grid"
    )
    path: str | None = Field(
        None, description="a pipeline folder or a run of `distill teach`; null is a toy's exact denoiser"
    )
    guidance: Scale = Field(1.0, description="classifier-free guidance scale; 1 is none")
    guidance_interval: tuple[Positive, Positive] | None = Field(
        None, description="noise levels between which there is guidance; null is everywhere"
    )
    guidance_embedding: Scale = Field(3.5, description="the scale that a guidance-distilled network (Flux) is fed")
    negative_prompt: str | None = Field(
        None, description="what guidance leads away from; null is the pipeline's own idea of no prompt"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the frozen networks; auto is that of accelerate's mixed precision"
    )

    @model_validator(mode="after")
    def _path_fits_name(self) -> Self:
        if self.path is None and self.name == "pipeline":
            raise ValueError("path: None does not go with name: pipeline (only a toy can do without)")
        if self.guidance != 1 and self.name != "pipeline":
            raise ValueError(f"guidance: {self.guidance}; a toy has no conditions to guide by")
        if self.name != "pipeline" and self.dtype not in ("auto", "float32"):
            raise ValueError(f"dtype: {self.dtype}; a toy is computed in float32")
        if self.guidance == 1 and (self.negative_prompt is not None or self.guidance_interval is not None):
            raise ValueError(
                f"negative_prompt, guidance_interval: {self.negative_prompt!r}, {self.guidance_interval}; of no use "
                "with guidance: 1, which is none"
            )
        low, high = self.guidance_interval or (0.0, 1.0)
        if not low < high:
            raise ValueError(f"guidance_interval: [{low}, {high}]; the first level must be below the second")
        return self

    @property
    def exact(self) -> bool:
        """Whether the teacher is no network, but a mixture in closed form."""
        return self.path is None


class Prompts(Section):
    """What a model of words is trained under. With neither file, the prompts are those of the real data."""

    file: str | None = Field(None, description="prompts: .txt (one a line), .csv or .jsonl")
    column: str = Field("caption", description="of a .csv or .jsonl: the column, the key")
    encoded: str | None = Field(None, description="a folder of `distill encode`, with the prompts' embeddings")
    height: Count | None = Field(None, description="of the pictures, in pixels; null is the pipeline's own")
    width: Count | None = Field(None, description="as height")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.file is not None and self.encoded is not None:
            raise ValueError(f"file, encoded: {self.file!r}, {self.encoded!r}; accepted is one of them")
        return self


class Lora(Section):
    """Adapters of low rank (Hu et al. 2021) on the teacher's own weights, which are held once for all networks."""

    rank: Count | None = Field(None, description="null is a full copy of the network")
    alpha: Positive | None = Field(None, description="adapters are scaled by alpha / rank; null is the rank")
    targets: tuple[str, ...] = Field(
        (), description="ends of the names of the layers that are adapted; none is every linear layer of a block"
    )

    @model_validator(mode="after")
    def _rank_where_there_is_more(self) -> Self:
        if self.rank is None and (self.alpha is not None or self.targets):
            raise ValueError(f"alpha, targets: {self.alpha}, {list(self.targets)}; of no use without a rank")
        return self


class Memory(Section):
    """What is held where, and for how long. It changes the result by rounding only, but for one thing: weights that are
    normalised over a batch (`divergence.normalise`) are so over a part of it."""

    checkpointing: bool = Field(False, description="compute activations again in the backward pass")
    ema: Literal["device", "cpu"] = Field("device", description="where the average of the weights is kept")
    accumulation: Count | None = Field(
        None,
        description="parts that a process computes its batch in, one after the other; null is the launcher's number",
    )


class Student(Section):
    """x = D_theta(sigma_init z, sigma_init), initialised from the teacher; or several such steps, noised in between."""

    sigma_init: Positive | None = Field(
        2.5, description="noise level of the student's input; null is where the stock pipeline starts"
    )
    steps: Count = Field(1, description="network evaluations for a sample; several are trained by backward simulation")
    hold: Count = Field(
        25, description="of several steps: updates in a row that train the same, for the fake score to follow it"
    )
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer(lr=2e-4, betas=(0.0, 0.99))
    ema: Fraction = Field(0.99, description="decay of the average of the weights")


class Fake(Section):
    """The online denoiser of the student's samples, initialised from the teacher."""

    optimizer: Optimizer = Optimizer(lr=4e-4, betas=(0.0, 0.99))
    levels: Literal["own", "student"] = Field(
        "own", description="the law of its noise levels: `fake.noise`, or that of the student's loss (DMD2, f-distill)"
    )
    noise: LogNormal = LogNormal()
    steps: Count = Field(1, description="updates for each update of the student")
    lora: Lora = Lora()
