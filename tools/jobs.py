"""Batches of evaluations: a manifest opened, into jobs whose keys say what decides their numbers.

Every job is a stream of samples under one or more extractors, against a reference; jobs that differ in nothing that
matters (a student under two samplers) are one. What is done with them is in workers.py.

    FOLDER/features/STREAM/EXTRACTOR/CHUNK.safetensors    FOLDER/results/KEY.json    FOLDER/samples/STREAM/NUMBER.png
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tools.arithmetic import one_thread
from tools.cache import Cache, Stream
from tools.digest import HashCache, digest_json
from tools.features import Extractor, load_extractor
from tools.manifest import Manifest, Point
from tools.metrics import NEEDS_LOGITS, NEEDS_ROWS, Reference, evaluate
from tools.presets import Shape
from tools.provenance import provenance
from tools.references import dealt, is_statistics, reference_stream, stream_of
from tools.results import VERSION, Result, Values
from tools.sources import Fixed, Source, SourceSettings, open_source
from tools.statistics import FeatureStatistics


@dataclass(frozen=True)
class Job:
    """One set of samples under all feature spaces. extractors: spec -> extractor."""

    point: Point
    stream: Stream
    extractors: Mapping[str, Extractor]
    facts: dict[str, Any]
    inputs: dict[str, Any]

    @cached_property
    def key(self) -> str:
        return self.result({}, {}).key

    def result(self, values: Values, how: dict[str, Any]) -> Result:
        source, n = self.stream.source, len(self.stream.numbers)
        sampled = source.count is None and source.facts.get("kind") != "student"
        jumps = ("sigma_skip", "tolerance") if self.point.axes["teleport"] is None else ()
        axes = {a: v for a, v in self.point.axes.items() if a == "draw" or (sampled and a not in jumps)}
        return Result(self.point.name, axes, n, source.nfe, values, self.facts, self.inputs, how)


class Batch:
    """A manifest's jobs, in a folder. Everything that can be wrong with them is found here, before any work.

    notes: points of the manifest that are no jobs, and why. Raises ValueError for sources, references, extractors and
    metrics that cannot be read or do not fit one another.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: str | Path,
        device: str = "cpu",
        command: str = "",
        hashes: HashCache | None = None,
    ) -> None:
        self.manifest, self.folder, self.device, self.command = manifest, Path(folder), device, command
        self.cache = Cache(folder)
        self._hashes = HashCache(self.folder / "hashes.json") if hashes is None else hashes
        self._read: dict[str, Reference] = {}
        self._fixed: dict[str, Fixed] = {}
        self._extractors: dict[tuple[str, Shape | None], Extractor] = {}
        self._classifying: dict[tuple[str, Shape | None], bool] = {}
        self.notes: list[str] = []
        self.statistics, self.references = self._open_references()
        self.jobs = self._plan()

    def _open_references(self) -> tuple[dict[str, FeatureStatistics], dict[str, Stream]]:
        """By extractor: statistics that were read, or the stream of images that they will be made of."""
        statistics, streams = {}, {}
        named = self.manifest.reference
        for spec in self.manifest.features:
            path = named if isinstance(named, str) else named[spec]
            if is_statistics(path):
                if isinstance(named, str) and len(self.manifest.features) > 1:
                    raise ValueError(f"reference: {path} is of one extractor; name one for each as EXTRACTOR: FILE")
                known = statistics[spec] = FeatureStatistics.load(path)
                if known.extractor is None:
                    self._note(f"{path}: does not say what made its features; taken to be {spec}'s")
                continue
            source = self._opened("digits:held-out" if path == "digits" else path)
            streams[spec] = reference_stream(source, self.device, self.manifest.chunk, self.manifest.batch)
        return statistics, streams

    def _plan(self) -> list[Job]:
        jobs: dict[str, Job] = {}
        for point in self.manifest.points():
            source = self._source(point)
            stream = self._samples(point, source)
            if stream is None:
                continue
            job = self._job(point, stream)
            jobs.setdefault(job.key, job)
        return list(jobs.values())

    def _source(self, point: Point) -> Source:
        return self._opened(point.path, SourceSettings(**{a: v for a, v in point.axes.items() if a != "draw"}))

    def _opened(self, path: str, settings: SourceSettings | None = None) -> Source:
        """Images that exist are opened once, whatever samplers the matrix has: every header of a folder is read."""
        if path in self._fixed:
            return self._fixed[path]
        source = open_source(path, settings, device=self.device, hashes=self._hashes)
        if isinstance(source, Fixed):
            self._fixed[path] = source
            if source.pictures.skipped:
                self._note(
                    f"{source.title}: {source.pictures.skipped} files in it are no images that are read; left out"
                )
        return source

    def _samples(self, point: Point, source: Source) -> Stream | None:
        """None, and a note, for a draw that a folder has no images left for."""
        draw, n, seed = point.axes["draw"], self.manifest.n, self.manifest.seed
        if source.count is None:
            return self._stream(source, seed + draw, range(n), {"seed": seed + draw})
        n = min(n, source.count)
        if n < 4:
            raise ValueError(f"source: {source.title} has {source.count} images; needed are 4 or more")
        start = draw * n
        numbers = dealt(source.count, seed)[start : start + n]
        facts = {"order": [seed, start, start + n]}
        if len(numbers) == n:
            return self._stream(source, seed, numbers, facts)
        enough = f"{point.name}: has {source.count} images, enough for {source.count // n} draws of {n}"
        self._note(f"{enough}; left out: draw {draw}")
        return None

    def _note(self, text: str) -> None:
        """Once, though it is so under every sampler."""
        if text not in self.notes:
            self.notes.append(text)

    def _stream(self, source: Source, seed: int, numbers: Sequence[int], which: dict[str, Any]) -> Stream:
        return stream_of(source, seed, numbers, which, self.device, self.manifest.chunk, self.manifest.batch)

    def _extractor(self, spec: str, shape: Shape | None) -> Extractor:
        if (spec, shape) not in self._extractors:
            self._extractors[spec, shape] = load_extractor(spec, shape, self.device)
        return self._extractors[spec, shape]

    def _job(self, point: Point, stream: Stream) -> Job:
        extractors = {spec: self._extractor(spec, stream.source.shape) for spec in self.manifest.features}
        for spec, extractor in extractors.items():
            self._check(spec, extractor, stream)
        metrics = {spec: list(self._applicable(spec, stream)) for spec in extractors}
        facts = {
            "version": VERSION,
            "stream": stream.key,
            "n": len(stream.numbers),
            "pairing": {"which": stream.facts["which"], "of": stream.source.count},
            "extractors": {spec: extractor.name for spec, extractor in extractors.items()},
            "references": {spec: self._reference_facts(spec) for spec in extractors},
            "metrics": metrics,
        }
        manifest = self.manifest.model_dump(mode="json")
        inputs = {"source": point.path, "axes": point.axes, "facts": stream.facts, "manifest": manifest}
        return Job(point, stream, extractors, facts, inputs)

    def _applicable(self, spec: str, stream: Stream) -> Sequence[str]:
        """The metrics without the accuracy of samples that nobody asked for by class, and a note."""
        metrics = self.manifest.features[spec]
        if stream.source.n_classes is not None or "class-accuracy" not in metrics:
            return metrics
        self._note(f"{stream.source.title}: has no classes; left out: {spec} class-accuracy")
        return [m for m in metrics if m != "class-accuracy"]

    def _reference_facts(self, spec: str) -> dict[str, Any]:
        if spec in self.statistics:
            return {"statistics": self.statistics[spec].digest(), "n": self.statistics[spec].count}
        stream = self.references[spec]
        images = digest_json({name: stream.facts[name] for name in ("source", "which")})
        return {"stream": stream.key, "images": images, "n": len(stream.numbers)}

    def _check(self, spec: str, extractor: Extractor, stream: Stream) -> None:
        """Raises ValueError where samples and reference do not compare, naming both, or a metric lacks its needs."""
        classes = [m for m in self._applicable(spec, stream) if m in NEEDS_LOGITS]
        if classes and not self._classifies(spec, stream.source.shape):
            raise ValueError(f"metrics: {classes[0]} needs an extractor that classifies; {extractor.name} does not")
        if "class-accuracy" in classes and extractor.preset.network == "inception":
            raise ValueError(
                "metrics: class-accuracy needs a classifier of the samples' classes; Inception has its own"
            )
        if spec in self.statistics:
            known, needs = self.statistics[spec], [m for m in self.manifest.features[spec] if m in NEEDS_ROWS]
            if known.extractor is not None and known.extractor != extractor.name:
                raise ValueError(f"reference: statistics of {known.extractor}, and samples read by {extractor.name}")
            if known.dim != extractor.dim:
                raise ValueError(f"reference: statistics of {known.dim} features; {extractor.name} has {extractor.dim}")
            if needs:
                raise ValueError(f"metrics: {needs[0]} needs the reference's images; for {spec} there are statistics")
            return
        reference = self.references[spec].source
        other = self._extractor(spec, reference.shape)
        if other.name != extractor.name:
            raise ValueError(
                f"features: {stream.source.title} is read by {extractor.name}, the reference {reference.title} by "
                f"{other.name}; they do not compare"
            )

    def _classifies(self, spec: str, shape: Shape | None) -> bool:
        """Asked of the network itself, by an image: that it does not is better known now than after the last chunk."""
        if (spec, shape) not in self._classifying:
            image = torch.zeros(shape or (3, 8, 8), dtype=torch.uint8)
            self._classifying[spec, shape] = self._extractor(spec, shape)([image]).logits is not None
        return self._classifying[spec, shape]

    def result_file(self, job: Job) -> Path:
        return self.folder / "results" / f"{job.key}.json"

    def streams_of(self, job: Job) -> list[tuple[Stream, list[Extractor]]]:
        """What has to be there before the job can be judged: the references' features, and its own."""
        needed: dict[str, tuple[Stream, list[Extractor]]] = {}
        for spec, stream in self.references.items():
            extractors = needed.setdefault(stream.key, (stream, []))[1]
            extractors.append(self._extractor(spec, stream.source.shape))
        return [*needed.values(), (job.stream, list(job.extractors.values()))]

    def judge(self, job: Job) -> Result:
        """The result of a job whose chunks are all there. Raises ValueError for chunks that were changed."""
        values: Values = {}
        made_on: dict[str, list[str]] = {}
        for spec, extractor in job.extractors.items():
            found = self.cache.read(job.stream, extractor.name)
            with one_thread():
                values[spec] = evaluate(
                    found.rows,
                    self._reference(spec),
                    self._applicable(spec, job.stream),
                    logits=found.logits,
                    labels=found.labels,
                    device=self.device,
                )
            made_on[spec] = list(found.made_on)
        making = found.making if job.stream.source.count is None else 0.0
        how = {
            "made_on": made_on,
            "seconds": found.seconds,
            "images_per_second": len(job.stream.numbers) / making if making else None,
        }
        return job.result(values, provenance(self.device, self.command) | how)

    def _reference(self, spec: str) -> Reference:
        if spec not in self._read:
            if spec in self.statistics:
                self._read[spec] = Reference(self.statistics[spec])
            else:
                stream = self.references[spec]
                name = self._extractor(spec, stream.source.shape).name
                self._read[spec] = Reference.of(self.cache.read(stream, name).rows, name)
        return self._read[spec]
