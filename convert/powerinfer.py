"""PowerInfer's own files: predictors that lie beside a model, and GGUF files with the magic PWRI.

A predictor repository holds model_0.pt, model_1.pt ... (fc1.weight [hidden, embedding], fc2.weight [neurons,
hidden], logits = fc2 . relu(fc1 . x)), and a config.json whose sparse_threshold says from which logit on a
neuron is computed. Layers are taken by their number: sorted as texts, 10 would come before 2.

Source: PowerInfer's conversion script and loader (formats only).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from pyinfer import names
from pyinfer.errors import FormatError, ModelNotFoundError, UnsupportedError
from pyinfer.names import GGMLType
from pyinfer_convert.recipe import Quant
from pyinfer_convert.sources import ACTIVATION, Source, SourceTensor
from pyinfer_convert.tensor_file import TensorFile
from pyinfer_convert.torch_file import open_torch_file

ARCHITECTURES = ("bamboo", "falcon", "llama", "opt")
QUANTS = ("f16", "q4_0")  # of which PowerInfer has sparse kernels
_LAYER = re.compile(r"model_(\d+)\.pt")
_TYPES = {"F16": GGMLType.F16, "BF16": GGMLType.BF16, "F32": GGMLType.F32}
_MOST_CONFIG_BYTES = 1 << 20


class Predictors:
    """An open predictor folder. threshold : None where its config.json has none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ModelNotFoundError(
                f"{folder}: no such folder, expected one with model_0.pt, model_1.pt ..."
            )
        found = {int(match[1]): path for path in folder.iterdir() if (match := _LAYER.fullmatch(path.name))}
        if sorted(found) != list(range(len(found))) or not found:
            known = ", ".join(map(str, sorted(found))) or "none"
            raise FormatError(
                f"{folder}: has predictors of layers {known}, "
                "expected model_0.pt, model_1.pt ... without gaps"
            )
        self.threshold = _threshold(folder)
        self.files: list[TensorFile] = []
        try:
            self.files.extend(open_torch_file(found[layer]) for layer in range(len(found)))
            for file in self.files:
                self._check(file)
        except BaseException:
            self.close()
            raise

    def _check(self, file: TensorFile) -> None:
        shapes = {
            name: file.tensors[name].shape for name in ("fc1.weight", "fc2.weight") if name in file.tensors
        }
        matrices = len(shapes) == 2 and all(len(shape) == 2 for shape in shapes.values())
        if not matrices or shapes["fc1.weight"][0] != shapes["fc2.weight"][1]:
            expected = "fc1.weight [hidden, embedding] and fc2.weight [neurons, hidden]"
            raise FormatError(f"{file.path}: has {shapes or sorted(file.tensors)}, expected {expected}")

    def tensors(self, embedding: int, neurons: int) -> list[SourceTensor]:
        """blk.N.fc1.weight and blk.N.fc2.weight of every layer. Raises FormatError where a shape does not fit
        the model.
        """
        found = []
        for layer, file in enumerate(self.files):
            for part, which, expected in (("fc1", 1, embedding), ("fc2", 0, neurons)):
                stored = file.tensors[f"{part}.weight"]
                if stored.shape[which] != expected:
                    raise FormatError(
                        f"{file.path}: {part}.weight has shape {list(stored.shape)}, "
                        f"the model needs {expected} there"
                    )
                if stored.dtype not in _TYPES:
                    raise UnsupportedError(
                        f"{file.path}: {part}.weight is {stored.dtype}, expected F16, BF16 or F32"
                    )
                name = names.weight(part, layer)
                load = _loader(file, f"{part}.weight")
                found.append(
                    SourceTensor(name, stored.shape, _TYPES[stored.dtype], load, done=file.give_back)
                )
        return found

    def close(self) -> None:
        for file in self.files:
            file.close()


def _loader(file: TensorFile, name: str):
    return lambda rows: file.read(name, rows)


def _threshold(folder: Path) -> float | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ValueError("too large")
        value = json.loads(path.read_text(encoding="utf-8")).get("sparse_threshold")
    except (ValueError, AttributeError) as error:
        raise FormatError(
            f"{path}: is no JSON object ({error}), expected a predictor's configuration"
        ) from error
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"{path}: sparse_threshold is {value!r}, expected a number")
    return float(value)


class WithPredictors:
    """A source with the predictors of its layers behind its own tensors."""

    def __init__(self, source: Source, predictors: Predictors) -> None:
        self._source, self._predictors = source, predictors
        self.label, self.name = source.label, source.name
        self.files = [*source.files, *(file.path for file in predictors.files)]
        self.notices = source.notices

    def metadata(self) -> dict[str, object]:
        found = self._source.metadata()
        # PowerInfer takes 0 where there is none; written, it says whose predictors these are.
        found[names.POWERINFER_SPARSE_THRESHOLD] = self._predictors.threshold or 0.0
        return found

    def tensors(self) -> list[SourceTensor]:
        """Raises FormatError when the number of layers or a shape is another than the model's."""
        found = [each for each in self._source.tensors() if not _is_predictor(each.name)]
        ups = {each.name: each for each in found if each.name.endswith(f".{names.FFN_UP}.weight")}
        layers = len(self._predictors.files)
        if sorted(ups) != sorted(names.weight(names.FFN_UP, layer) for layer in range(layers)):
            raise FormatError(
                f"{self._predictors.folder}: has predictors of {layers} layers, the model has {len(ups)}"
            )
        neurons, embedding = ups[names.weight(names.FFN_UP, 0)].shape
        return [*found, *self._predictors.tensors(embedding, neurons)]

    def close(self) -> None:
        self._predictors.close()
        self._source.close()


def _is_predictor(name: str) -> bool:
    return name.endswith((f".{names.FC1}.weight", f".{names.FC2}.weight"))


def with_predictors(source: Source, folder: Path) -> WithPredictors:
    """The source with the predictors of a folder; closing it closes both."""
    return WithPredictors(source, Predictors(folder))


def check_powerinfer(source: Source, quant: Quant) -> None:
    """Raises UnsupportedError for what PowerInfer could not run: its loader wants sparse layers with
    predictors.
    """
    if quant.name not in QUANTS:
        known = " and ".join(QUANTS)
        raise UnsupportedError(f"PowerInfer computes sparse layers in {known}, not in {quant.name}")
    architecture = source.metadata()[names.ARCHITECTURE]
    text = architecture if isinstance(architecture, str) else getattr(architecture, "data", b"")[12:].decode()
    if text not in ARCHITECTURES:
        raise UnsupportedError(f"{source.label}: PowerInfer knows {', '.join(ARCHITECTURES)}, not {text}")
    activation = source.metadata().get(ACTIVATION, "relu")
    said = activation if isinstance(activation, str) else getattr(activation, "data", b"")[12:].decode()
    if said != "relu":
        raise UnsupportedError(
            f"{source.label}: its activation is {said}, PowerInfer would compute plain ReLU"
        )
    found = {each.name for each in source.tensors()}
    layers = {name.split(".")[1] for name in found if name.startswith("blk.")}
    for layer in sorted(layers, key=int):
        for part in (names.FFN_DOWN_T, names.FC1, names.FC2):
            name = names.weight(part, int(layer))
            if name not in found:
                hint = (
                    "give its predictors with --predictor"
                    if part != names.FFN_DOWN_T
                    else "its activation must be a ReLU"
                )
                raise UnsupportedError(f"{source.label}: {name} is missing, which PowerInfer needs; {hint}")


def check_types(types: Iterable[tuple[str, GGMLType]]) -> None:
    """Raises UnsupportedError for a matrix of a sparse layer whose type PowerInfer's sparse kernels do not
    know.
    """
    sparse = (names.FFN_GATE, names.FFN_UP, names.FFN_DOWN_T, names.FC1, names.FC2)
    for name, type_ in types:
        parts = name.split(".")
        if (
            parts[0] == "blk"
            and parts[-2] in sparse
            and parts[-1] == "weight"
            and type_.name.lower() not in QUANTS
        ):
            known = " and ".join(QUANTS)
            raise UnsupportedError(
                f"{name} would be {type_.name}, PowerInfer computes sparse layers in {known}"
            )
