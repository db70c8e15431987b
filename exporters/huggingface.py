"""Hugging Face model directories: config.json, safetensors, optional tokenizer.

Nothing is fetched, and no code out of the directory runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError, ExportError, OptionError, SourceError, first_line
from deploykit.exporters.base import ExportOptions, Source, Way
from deploykit.exporters.hf_encoder_decoder import encoder_decoder_graphs
from deploykit.exporters.hf_generation import Graph, decoder_graph, decoder_tokens
from deploykit.exporters.hf_inputs import Inputs, choose, joined
from deploykit.exporters.hf_media import audio_inputs, image_inputs
from deploykit.exporters.hf_tasks import Task, class_for, parse_task, task_of
from deploykit.exporters.hf_text import text_inputs
from deploykit.exporters.pytorch import Call, TorchSource
from deploykit.exporters.shapes import plan_inputs
from deploykit.extras import require

_ASSETS = (
    "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_EAGER = "eager"
_OWN_MODULE = "export a module of your own: file.py:factory"


class HuggingFaceSource(TorchSource):
    """One graph of a Hugging Face model.

    Args:
        model: The whole model, whose attention can be exchanged.
        graph: Which part of it, and its inputs.
        options: What the user asked for.
        label: What the user called the source.
        assets: Files that belong to the model.
        notes: What the user must know.
    """

    def __init__(
        self,
        model: Any,
        graph: Graph,
        options: ExportOptions,
        label: str,
        assets: tuple[Path, ...],
        notes: Sequence[str],
    ) -> None:
        self._model = model
        inputs = graph.inputs
        example = inputs.sized(options.dims)
        feeds = inputs.draw(example)
        wanted = plan_inputs(feeds, options) if options.dynamic else inputs.by_default(example)
        chosen = choose(inputs, wanted, example)
        super().__init__(
            graph.module,
            feeds,
            Call(tuple(feeds), 0, graph.constants),
            options,
            label,
            specs=chosen.specs,
            draw=chosen.draw,
            ranges=inputs.ranges,
            limits=chosen.limits,
            check=chosen.check,
            data=inputs.data,
            kind="huggingface",
            assets=assets,
            notes=notes,
        )

    @property
    def ways(self) -> tuple[Way, ...]:
        """As for any module, and then the same with eager attention where the model has another."""
        own = super().ways
        if getattr(self._model.config, "_attn_implementation", _EAGER) == _EAGER:
            return own
        eager = tuple(replace(way, attention=_EAGER) for way in own)
        # Fixed shapes are the last resort: eager attention costs speed, fixed shapes cost the user's inputs.
        return tuple(sorted((*own, *eager), key=lambda way: not way.dynamic))

    def write(self, way: Way, target: Path, opset: int | None) -> None:
        """Export, with the way's attention; the reference keeps the model's own."""
        with self._attention(way.attention), _global_pooling(self._model), _batched_experts(self._model):
            super().write(way, target, opset)

    def renewed(self, module: Any = None) -> TorchSource:
        """This source with other weights, or with another model, such as one with fewer layers.

        Raises:
            ExportError: It is a part of a model, which cannot be another one.
        """
        if module is not None and self.module is not self._model:
            raise ExportError(f"{self.label} is exported in parts, which cannot be exchanged", hint=_OWN_MODULE)
        other = super().renewed(module)
        assert isinstance(other, HuggingFaceSource)
        other._model = self._model if module is None else module
        return other

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        own = getattr(self._model.config, "_attn_implementation", None)
        if not name:
            yield
            return
        try:
            self._model.set_attn_implementation(name)
        except Exception as exc:
            raise ExportError(f"{type(self._model).__name__} has no {name} attention ({first_line(exc)})") from exc
        try:
            yield
        finally:
            self._model.set_attn_implementation(own)


@contextmanager
def _global_pooling(model: Any) -> Iterator[None]:
    """Average over the whole picture where that is what a pool larger than any picture means.

    EfficientNet's pool has as many rows and columns as the network has channels, and rounds up; OpenVINO refuses a
    window that is larger than what it slides over.
    """
    torch = require("torch", extra="torch")
    width = getattr(model.config, "hidden_dim", None)
    found = [
        (parent, name, pool)
        for parent in model.modules()
        for name, pool in parent.named_children()
        if isinstance(pool, torch.nn.AvgPool2d) and pool.ceil_mode and pool.kernel_size == width
    ]
    for parent, name, _ in found:
        setattr(parent, name, torch.nn.AdaptiveAvgPool2d(1))
    try:
        yield
    finally:
        for parent, name, pool in found:
            setattr(parent, name, pool)


@contextmanager
def _batched_experts(model: Any) -> Iterator[None]:
    """Mixtures of experts as batched matrix products: the default groups tokens by a kernel that ONNX does not have."""
    able = getattr(model, "_can_set_experts_implementation", None)
    if able is None or not able():
        yield
        return
    own = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(own)


def open_model_directory(path: Path, options: ExportOptions) -> dict[str, Source]:
    """Load a model directory.

    Returns:
        The graphs that it becomes, by the name of the part: one with an empty name, or for example "encoder" and
        "decoder".

    Raises:
        SourceError: Unreadable, without safetensors, with missing weights, or of a kind not supported.
        ExportError: The task or the part is none of the model's.
    """
    transformers = require("transformers", extra="hf")
    if options.inputs:
        raise OptionError("--input does not apply to a Hugging Face directory, whose config names the inputs")
    task = parse_task(options.task)
    config = _config(transformers, path)
    model = _load(path, class_for(transformers, config, task))
    found = task or task_of(model)
    notes = [f"exported as {type(model).__name__}{f', for {found}' if found else ''}"]
    if found is Task.TEXT_GENERATION and "past_key_values" not in inspect.signature(model.forward).parameters:
        notes.append("the model has no key-value cache: the graph computes the whole text at every step")
    try:
        graphs = _graphs(transformers, model, path, options, found)
    except DeploykitError:
        raise
    except Exception as exc:  # a model of an unforeseen build: whatever fails, it is not the user's command
        raise ExportError(
            f"{type(model).__name__} cannot be taken apart into graphs ({first_line(exc)})", hint=_OWN_MODULE
        ) from exc
    _refuse_dims(graphs, options)
    assets = tuple(p for name in _ASSETS if (p := path / name).is_file())
    return {g.name: HuggingFaceSource(model, g, options, str(path), assets, notes) for g in graphs}


def _graphs(transformers: Any, model: Any, path: Path, options: ExportOptions, task: Task | None) -> tuple[Graph, ...]:
    """What a model becomes, by what its forward takes."""
    config = model.config
    parameters = tuple(inspect.signature(model.forward).parameters)
    main = model.main_input_name
    if "decoder_input_ids" in parameters and task not in (Task.TEXT_CLASSIFICATION, Task.QUESTION_ANSWERING):
        source = _encoder_inputs(transformers, model, path, parameters, main)
        if "encoder_outputs" not in parameters or not hasattr(model, "get_encoder") or task is Task.FEATURE_EXTRACTION:
            raise _unsupported(model, parameters)
        return _selected(encoder_decoder_graphs(model, source, decoder_tokens(config)), options)
    if {"pixel_values", "input_ids"} <= set(parameters):
        return _selected(_towers(transformers, model, path, task, parameters), options)
    constants = {"use_cache": False} if "use_cache" in parameters else {}
    if task is Task.TEXT_GENERATION and "past_key_values" in parameters:
        text = text_inputs(transformers, config, path, parameters)
        return _selected((decoder_graph(model, text, parameters),), options)
    inputs = _encoder_inputs(transformers, model, path, parameters, main)
    return _selected((Graph("", model, inputs, constants),), options)


def _encoder_inputs(transformers: Any, model: Any, path: Path, parameters: Sequence[str], main: str) -> Inputs:
    if main in ("input_values", "input_features") and main in parameters:
        return audio_inputs(model.config, path, main, parameters)
    if "pixel_values" in parameters and "input_ids" not in parameters:
        encoder = getattr(model.config, "encoder", None) or model.config
        return image_inputs(encoder, path)
    if "input_ids" in parameters:
        return text_inputs(transformers, model.config, path, parameters)
    raise _unsupported(model, parameters)


def _towers(
    transformers: Any, model: Any, path: Path, task: Task | None, parameters: Sequence[str]
) -> tuple[Graph, ...]:
    """The text and the image tower of CLIP and its kin, or both as one graph for zero-shot classification."""
    towers = getattr(model, "get_text_features", None), getattr(model, "get_image_features", None)
    if None in towers or not hasattr(model.config, "text_config") or not hasattr(model.config, "vision_config"):
        raise _unsupported(model, parameters)
    text = text_inputs(
        transformers, model.config.text_config, path, tuple(inspect.signature(model.get_text_features).parameters)
    )
    image = image_inputs(model.config.vision_config, path)
    if task is Task.ZERO_SHOT_IMAGE_CLASSIFICATION:
        return (Graph("", _method(model, None), joined(text, image), {"return_dict": True}),)
    return (
        Graph("text", _method(model, "get_text_features"), text, {}),
        Graph("image", _method(model, "get_image_features"), image, {}),
    )


def _method(model: Any, name: str | None) -> Any:
    """A module whose forward is a method of the model, with the embeddings and scores out of what it returns."""
    torch = require("torch", extra="torch")

    class Method(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **tensors: Any) -> Any:
            if name is None:
                out = self.inner(**tensors)
                return {n: out[n] for n in _SCORES if n in out}
            out = getattr(self.inner, name)(**tensors)
            # Newer releases return the tower's whole output, whose pooler_output holds the projected embedding.
            pooled = out if isinstance(out, torch.Tensor) else out.pooler_output
            return {"text_embeds" if name == "get_text_features" else "image_embeds": pooled}

    return Method().eval()


_SCORES = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


def _selected(graphs: Sequence[Graph], options: ExportOptions) -> tuple[Graph, ...]:
    if options.part is None:
        return tuple(graphs)
    names = [g.name for g in graphs if g.name]
    if options.part not in names:
        raise OptionError(
            f"there is no part {options.part!r}",
            expected=f"one of {', '.join(names)}" if names else "no --part: the model is one graph",
        )
    return tuple(g for g in graphs if g.name == options.part)


def _unsupported(model: Any, parameters: Sequence[str]) -> ExportError:
    return ExportError(
        f"{type(model).__name__} takes {', '.join(list(parameters)[:4])}",
        expected="a text, image or speech model, a decoder, an encoder with a decoder, or two towers as of CLIP",
        hint=_OWN_MODULE,
    )


def _refuse_dims(graphs: Sequence[Graph], options: ExportOptions) -> None:
    known = list(dict.fromkeys(symbol for graph in graphs for symbol in graph.inputs.example))
    unknown = next((name for name in options.dims if name not in known), None)
    if unknown is not None:
        raise OptionError(f"--dim names {unknown!r}", expected=f"one of {', '.join(known)}")


def _config(transformers: Any, path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as exc:
        raise SourceError(
            f"cannot read {path / 'config.json'} ({first_line(exc)})",
            expected="the config of a known architecture",
        ) from exc


def _load(path: Path, model_class: Any) -> Any:
    if not any(path.glob("*.safetensors")):
        raise SourceError(
            f"{path} has no *.safetensors",
            expected="weights as safetensors (pickled .bin files may run code)",
            hint="convert them: model.save_pretrained(DIR)",
        )
    try:
        model, info = model_class.from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, output_loading_info=True, dtype="float32"
        )
    except Exception as exc:
        raise SourceError(
            f"cannot load {path} as {model_class.__name__} ({first_line(exc)})", hint="fetch the directory again"
        ) from exc
    _check_loaded(path, model_class.__name__, info)
    model.config.return_dict = True
    return model.eval()


def _check_loaded(path: Path, name: str, info: Mapping[str, Any]) -> None:
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        # transformers fills these with random numbers; whatever is exported then is not the user's model.
        raise SourceError(
            f"{path} lacks {len(missing)} weights of {name}, the first is {missing[0]}",
            expected="a checkpoint of this very class",
            hint='correct "architectures" in config.json, leave --task out, or fetch the directory again',
        )
    if info.get("mismatched_keys"):
        raise SourceError(
            f"{path}: weights of another shape than config.json says: {sorted(info['mismatched_keys'])[0]}"
        )
