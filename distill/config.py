"""The schemas of the experiments: frozen, strict, and free of torch, so that `--help` answers at once.

A configuration file is the whole record of an experiment. Its `command` says what it is for.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from distill.methods import Degradation, DiscriminatorChoice, DivergenceChoice, Real, StudentNoise, TargetChoice
from distill.sections import (
    Count,
    Data,
    EncodedImages,
    Fake,
    Fraction,
    Logging,
    LogNormal,
    Lora,
    Memory,
    Network,
    Optimizer,
    Positive,
    Prompts,
    Scale,
    Section,
    Seed,
    Student,
    TeacherSource,
    Toy,
    ToyName,
)


class Teach(Section):
    """Train a small class-conditional EDM teacher and save it as a diffusers folder; or the network of a toy."""

    command: Literal["teach"] = Field("teach", description="what this file is for")
    run: str = Field(description="the run folder")
    seed: Seed = Field(0, description="decides everything random")
    mixture: ToyName | None = Field(None, description="a toy to learn instead of data, by a network as `toy` says")
    data: Data = Data()
    network: Network = Network()
    toy: Toy = Toy()
    optimizer: Optimizer = Optimizer()
    sigma_data: Positive = Field(0.5, description="standard deviation of the data")
    sigma_min: Positive = Field(0.01, description="lowest noise level: there D(x, sigma_min) = x")
    sigma_max: Positive = Field(20.0, description="highest noise level")
    noise: LogNormal = LogNormal()
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null label, for guidance")
    ema: Fraction = Field(0.998, description="decay of the average of the weights")
    steps: Count = Field(1000, description="updates")
    batch_size: Count = Field(128, description="images per update, over all processes")
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min: {self.sigma_min} is not below sigma_max: {self.sigma_max}")
        if self.mixture is not None and self.data != Data():
            raise ValueError(f"mixture: {self.mixture}; is learned from its own samples, accepted is no data")
        return self


class Train(Section):
    """Distil a teacher into a one-step student."""

    command: Literal["train"] = Field("train", description="what this file is for")
    run: str = Field(description="the run folder")
    seed: Seed = Field(0, description="decides everything random")
    teacher: TeacherSource
    student: Student = Student()
    fake: Fake = Fake()
    noise: StudentNoise = StudentNoise()
    target: TargetChoice = TargetChoice()
    degradation: Degradation = Degradation()
    divergence: DivergenceChoice = DivergenceChoice()
    discriminator: DiscriminatorChoice = DiscriminatorChoice()
    adversarial_weight: Scale = Field(0.0, description="of the generator term softplus(-ln r); 0 is none")
    real: Real = Real()
    prompts: Prompts = Prompts()
    memory: Memory = Memory()
    toy: Toy = Toy()
    steps: Count = Field(400, description="updates of the student")
    batch_size: Count = Field(128, description="samples per update, over all processes")
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _real_samples_where_needed(self) -> Self:
        if self.real.name == "none" and self.adversarial_weight:
            raise ValueError(
                f"adversarial_weight: {self.adversarial_weight} needs real samples (real.name: data, encoded or "
                "teacher)"
            )
        if self.real.name == "none" and not self.divergence.constant:
            raise ValueError(
                f"divergence.name: {self.divergence.name} weights by a ratio, whose discriminator needs real samples "
                "(real.name: data, encoded or teacher)"
            )
        if self.discriminator.features == "teacher" and self.teacher.exact and self.real.name != "none":
            raise ValueError("discriminator.features: teacher; an exact teacher has no network, accepted is fake")
        return self

    @model_validator(mode="after")
    def _path_fits(self) -> Self:
        target = self.target
        if target.moves and target.updates >= self.steps:
            raise ValueError(
                f"target.updates: {target.updates} do not leave an update of steps: {self.steps} for the teacher"
            )
        if target.name == "nodes" and target.path is None and target.updates < self.degradation.nodes - 1:
            raise ValueError(
                f"target.updates: {target.updates} are less than one for each of the {self.degradation.nodes - 1} "
                f"targets between degradation.nodes: {self.degradation.nodes} and the teacher"
            )
        if target.name in ("nodes", "weight-interpolation") and self.teacher.exact:
            raise ValueError(
                f"target.name: {target.name}; an exact teacher has no weights, accepted are fixed, warm and "
                "score-interpolation (or a teacher.path of a toy's network)"
            )
        if target.ratio == "bridge" and (self.real.name == "none" or self.divergence.constant):
            raise ValueError(
                f"target.ratio: bridge; needed are real samples (real.name: {self.real.name}) and a divergence that "
                f"weights (divergence.name: {self.divergence.name})"
            )
        if target.ratio == "bridge" and not self.divergence.normalise:
            raise ValueError(
                "divergence.normalise: False; a bridge's ratio is known up to a constant only, accepted is True"
            )
        if target.ratio == "bridge" and self.discriminator.r1:
            raise ValueError(f"discriminator.r1: {self.discriminator.r1}; a bridge has no penalty, accepted is 0")
        if target.name == "nodes" and target.path is None and self.degradation.nodes < 2:
            raise ValueError(
                f"degradation.nodes: {self.degradation.nodes}; target.name: nodes needs 2 or more (1 is that of warm)"
            )
        return self

    @model_validator(mode="after")
    def _networks_fit(self) -> Self:
        choice, adapters = self.discriminator, any(part.lora.rank is not None for part in (self.student, self.fake))
        if self.memory.checkpointing and choice.features == "fake" and choice.r1 and choice.r1_form == "exact":
            raise ValueError(
                "discriminator.r1_form: exact; what a second derivative goes through cannot be computed again "
                "(memory.checkpointing), accepted are difference, and features of the teacher"
            )
        if adapters and self.teacher.dtype == "float16":
            raise ValueError(
                "teacher.dtype: float16; gradients of adapters go through it, and vanish there: accepted are bfloat16 "
                "and float32"
            )
        return self

    @model_validator(mode="after")
    def _toys_have_no_pipeline(self) -> Self:
        if self.teacher.name == "pipeline":
            return self
        of_pipelines = {
            "student.lora.rank": (self.student.lora.rank, None),
            "fake.lora.rank": (self.fake.lora.rank, None),
            "memory.checkpointing": (self.memory.checkpointing, False),
            "real.encoded": (self.real.encoded, None),
            "real.data.path": (self.real.data.path, None),
            **{f"prompts.{name}": (value, getattr(Prompts(), name)) for name, value in self.prompts},
        }
        for name, (value, none) in of_pipelines.items():
            if value != none:
                raise ValueError(
                    f"{name}: {value}; is for teachers that are pipelines, teacher.name: {self.teacher.name} is a toy"
                )
        return self

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Self:
        prompts, rows = self.prompts, self.real.encoded
        if rows is not None and (prompts.file is not None or prompts.encoded not in (None, rows)):
            raise ValueError(
                f"prompts: {prompts.file or prompts.encoded}; with real.name: encoded the prompts are those beside the "
                "latents, accepted is none"
            )
        return self

    @property
    def path(self) -> str:
        """The folder of the degradation path."""
        return self.target.path or f"{self.run}/path"

    @property
    def prompt_source(self) -> Prompts:
        """Where prompts come from: where no file is named, from beside the real latents."""
        if self.prompts.file is None and self.prompts.encoded is None:
            return self.prompts.model_copy(update={"encoded": self.real.encoded})
        return self.prompts

    @property
    def fake_noise(self) -> StudentNoise:
        """The law of the fake score's noise levels, in both stages."""
        if self.fake.levels == "student":
            return self.noise
        own, ends = self.fake.noise, self.noise
        return StudentNoise(
            name="log-normal", mean=own.mean, std=own.std, sigma_min=ends.sigma_min, sigma_max=ends.sigma_max
        )

    def first_stage(self) -> "FirstStage":
        """What decides the degradation path, of all that decides this run."""
        return FirstStage(
            run=self.path,
            seed=self.seed,
            teacher=self.teacher.model_copy(
                update={"guidance": 1.0, "guidance_interval": None, "negative_prompt": None}
            ),
            toy=self.toy,
            sigma_init=self.student.sigma_init,
            student_steps=self.student.steps,
            lora=self.fake.lora,
            prompts=self.prompt_source,
            memory=self.memory,
            levels=self.fake.levels,
            noise=self.fake_noise.model_copy(update={"weighting": StudentNoise().weighting}),
            degradation=self.degradation,
            batch_size=self.batch_size,
            logging=self.logging,
        )


class FitGaussian(Section):
    """Fit a Gaussian (mean, covariance of low rank) to images or their latents, to teleport with.

    Images are read as they are needed. A run that is killed leaves no file: start it again. Started by `accelerate
    launch`, processes share the images.
    """

    command: Literal["gaussian"] = Field("gaussian", description="what this file is for")
    data: Data = Data()
    out: str = Field(description="the file to write, named .safetensors; an older one is replaced at the end")
    classes: bool = Field(False, description="a mean for each class of the data, and one covariance within them")
    rank: Count | None = Field(None, description="directions with a variance of their own; null is by the tolerance")
    tolerance: Positive = Field(0.05, description="what a jump may cost, in nats")
    flip: bool = Field(False, description="fit to every image and its mirror image")
    pipeline: str | None = Field(
        None, description="folder of a latent pipeline: the latents of its VAE are fitted; null is the pixels"
    )
    batch: Count = Field(16, description="images in memory at once, in each process")
    seed: Seed = Field(0, description="of the latents, and of the samples that a jump's cost is judged by")
    device: str | None = Field(None, description="where the VAE runs; null is a GPU if there is one")

    @model_validator(mode="after")
    def _is_named_safetensors(self) -> Self:
        if not self.out.endswith(".safetensors"):
            raise ValueError(f"out: {self.out} is not named .safetensors")
        return self


class Encode(Section):
    """Encode images and prompts once, to train with: latents by a pipeline's VAE, embeddings by its text encoders.

    A run that is killed goes on where it stopped: start it again. Started by `accelerate launch`, processes share the
    work. Images have the words of their folder: NAME.txt beside each, or metadata.csv or .jsonl (file_name, caption).
    """

    command: Literal["encode"] = Field("encode", description="what this file is for")
    pipeline: str = Field(description="folder of a pipeline of diffusers")
    out: str = Field(description="the folder to write")
    data: EncodedImages = EncodedImages()
    prompts: str | None = Field(
        None, description="prompts (.txt, one a line; .csv; .jsonl); beside images a table of their file_name and words"
    )
    column: str = Field("caption", description="of a table, with the words")
    negative_prompt: str | None = Field(None, description="encoded too, beside what the pipeline guides away from")
    flip: bool = Field(False, description="encode every image's mirror image too")
    rows: Count = Field(512, description="in a file")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of what is written")
    text_dtype: Literal["float16", "bfloat16", "float32"] = Field("float32", description="that text encoders run in")
    batch: Count = Field(8, description="images encoded at once, in each process")
    seed: Seed = Field(0, description="of the latents")
    device: str | None = Field(None, description="where VAE and text encoders run; null is a GPU if there is one")

    @model_validator(mode="after")
    def _has_something_to_encode(self) -> Self:
        if self.data.path is None and self.prompts is None:
            raise ValueError("data.path, prompts: None, None; needed are images, prompts, or both")
        if self.data.path is None and self.flip:
            raise ValueError("flip: True; there are no images")
        return self


class FirstStage(Section):
    """Record how the teacher degrades to a first student: what a path's own configuration says."""

    command: Literal["degrade"] = Field("degrade", description="what this file is for")
    run: str = Field(description="the folder of the path")
    seed: Seed = Field(description="decides everything random")
    teacher: TeacherSource
    toy: Toy
    sigma_init: Positive | None = Field(description="noise level of the student's input; null is the stock pipeline's")
    student_steps: Count = Field(1, description="of the first student")
    lora: Lora = Field(Lora(), description="of the network that is degraded")
    prompts: Prompts = Prompts()
    memory: Memory = Memory()
    levels: Literal["own", "student"] = Field("own", description="whose law `noise` is: fake.noise, or the student's")
    noise: StudentNoise = Field(description="noise levels of the denoising loss; its weighting is of no use here")
    degradation: Degradation
    batch_size: Count = Field(description="samples per update, over all processes")
    logging: Logging


COMMANDS: dict[str, type[Teach] | type[Train]] = {"teach": Teach, "degrade": Train, "train": Train}
