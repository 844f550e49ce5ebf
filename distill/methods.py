"""The parts of a run's configuration that are its method: the target, the divergence, the ratio, the noise levels.

Frozen, strict and free of torch, as `distill.sections`, which has networks, data and what a run holds and writes.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.sections import Count, Data, Fraction, Optimizer, Positive, Scale, Section, Seed, SolverName

DivergenceName = Literal[
    "reverse-kl",
    "softened-reverse-kl",
    "jensen-shannon",
    "squared-hellinger",
    "forward-kl",
    "jeffreys",
    "neyman",
    "alpha",
]


class StudentNoise(Section):
    """Noise levels of the student's loss: uniform in the Karras grid's index (DMD), or log-normal (Diff-Instruct)."""

    name: Literal["karras", "log-normal"] = Field("karras", description="the law of the levels")
    sigma_min: Positive | None = Field(None, description="lowest level; null is the teacher's")
    sigma_max: Positive | None = Field(None, description="highest level; null is the teacher's")
    rho: Positive = Field(7.0, description="exponent of the grid")
    trim: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.02, description="of karras: share left out at each end")
    mean: Annotated[float, Field(allow_inf_nan=False)] = Field(-1.2, description="of log-normal: mean of ln sigma")
    std: Positive = Field(1.2, description="of log-normal: standard deviation of ln sigma")
    weighting: Literal["distance", "level", "none"] = Field(
        "distance",
        description="levels made alike by each sample's distance to its prediction (DMD), by level only, or not at all "
        "(Diff-Instruct)",
    )


class TargetChoice(Section):
    """What the student is pulled towards: the teacher, or a path that leads back to it (DisBack)."""

    name: Literal["fixed", "warm", "nodes", "weight-interpolation", "score-interpolation"] = Field(
        "fixed",
        description="fixed: the teacher throughout; the others start from a fake score that fits the first student, "
        "and pull to the teacher at once (warm) or first to what lies between, as the name says",
    )
    path: str | None = Field(None, description="folder of the degradation path, made if missing; null is RUN/path")
    updates: Count = Field(50, description="updates before the teacher is the target; 10 to 15 % of the run")
    schedule: Literal["even", "adaptive"] = Field(
        "even", description="even; or on as soon as the mismatch has halved since the last switch, even at the latest"
    )
    stages: Count = Field(5, description="of an adaptive interpolation; of nodes, every one is a stage")
    ratio: Literal["teacher", "bridge"] = Field(
        "teacher",
        description="teacher: a divergence weights from the teacher on; bridge: on the way too, by a second ratio "
        "to the first student's samples (score-interpolation)",
    )

    @model_validator(mode="after")
    def _bridge_needs_score_interpolation(self) -> Self:
        if self.ratio == "bridge" and self.name != "score-interpolation":
            raise ValueError(
                f"ratio: bridge does not go with name: {self.name}; the ratio on the way is known for "
                "score-interpolation"
            )
        return self

    @property
    def moves(self) -> bool:
        """Whether the target is not the teacher from the first update on."""
        return self.name not in ("fixed", "warm")


class Degradation(Section):
    """DisBack's first stage: a copy of the teacher learns the first student's samples, and is kept on the way."""

    optimizer: Optimizer = Optimizer(lr=1e-3, betas=(0.0, 0.99))
    steps: Count = Field(200, description="updates at most; over so many the learning rate's schedule runs")
    check_every: Count = Field(25, description="updates between looks at the loss of a fixed batch")
    tolerance: Fraction = Field(0.02, description="the relative fall of that loss below which a look is in vain")
    patience: Count = Field(2, description="looks in vain, one after the other, that end the stage")
    nodes: Annotated[int, Field(ge=1)] = Field(5, description="networks that are kept, the last one among them")
    spacing: Literal["mismatch", "steps"] = Field(
        "mismatch", description="of the nodes: equal in mismatch to the last one, or in the logarithm of the step"
    )
    storage: Literal["full", "half", "low-rank"] = Field(
        "full", description="a node as a full copy, or as its difference to the teacher in float16, or of low rank"
    )
    rank: Count = Field(8, description="for low-rank")


class DivergenceChoice(Section):
    """The divergence D_f(teacher || student) that is minimised, through its weight h(r) = r^2 f''(r)."""

    name: DivergenceName = Field("reverse-kl", description="all but reverse-kl weight by a ratio, and need `real`")
    exponent: Annotated[float, Field(allow_inf_nan=False)] | None = Field(None, description="for alpha: h = r^exponent")
    clip: tuple[Positive, Positive] = Field((0.1, 20.0), description="bounds of the estimated ratio")
    normalise: bool = Field(True, description="divide r by its mean in a noise bin, then h by its mean over the batch")
    bins: Count = Field(10, description="noise bins, equal in the Karras index; few samples a bin pull r to 1")
    decay: Fraction = Field(0.0, description="of the bins' running means; 0 keeps the present batch only")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.exponent is not None) != (self.name == "alpha"):
            raise ValueError(f"exponent: {self.exponent} does not go with name: {self.name} (alpha needs one)")
        if not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip: {list(self.clip)}; the first bound must be below the second")
        return self

    @property
    def constant(self) -> bool:
        """Whether the weight is 1 whatever the ratio."""
        return self.name == "reverse-kl" or self.exponent == 0


class Real(Section):
    """What a discriminator takes for real. With `none` there is no discriminator."""

    name: Literal["none", "data", "encoded", "teacher"] = Field(
        "none",
        description="images, latents of `distill encode`, or samples that the teacher makes (a toy's are exact always)",
    )
    data: Data = Field(Data(), description="the images, for name: data")
    encoded: str | None = Field(None, description="for name: encoded, the folder of `distill encode`")
    count: Count = Field(10_000, description="for name: teacher, how many samples are made, once")
    sampler: SolverName = Field("heun", description="for name: teacher")
    steps: Count = Field(18, description="of the sampler")
    seed: Seed = Field(0, description="of the teacher's samples, which runs of any seed share")
    cache: str = Field("runs/teacher-samples", description="folder of samples that were made, by what made them")

    @model_validator(mode="after")
    def _folder_fits_name(self) -> Self:
        if (self.encoded is not None) != (self.name == "encoded"):
            raise ValueError(f"encoded: {self.encoded!r} does not go with name: {self.name}")
        return self


class DiscriminatorChoice(Section):
    """Heads on the features of a network, trained with the fake score where `real` says against what."""

    features: Literal["teacher", "fake"] = Field(
        "teacher", description="whose encoder is read: the frozen teacher's, or the fake score's, trained too"
    )
    levels: tuple[int, ...] | None = Field(
        None, description="resolutions of a UNet (-1 is the bottleneck) or blocks of a transformer; null is a choice"
    )
    lr: Positive | None = Field(None, description="peak learning rate of the heads; null is the fake score's")
    weight: Positive = Field(1.0, description="of the discriminator's loss beside the fake score's")
    r1: Scale = Field(0.0, description="gamma of the penalty gamma / 2 |grad ln r|^2 at real samples")
    r1_form: Literal["exact", "difference"] = Field("exact", description="by a second derivative, or a difference")
