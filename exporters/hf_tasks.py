"""Tasks of Hugging Face models: which class loads a checkpoint, and what a class is for."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from deploykit.errors import OptionError, SourceError, first_line


class Task(StrEnum):
    """What a model is for; the names are those of Hugging Face's pipelines."""

    FEATURE_EXTRACTION = "feature-extraction"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    FILL_MASK = "fill-mask"
    QUESTION_ANSWERING = "question-answering"
    MULTIPLE_CHOICE = "multiple-choice"
    TEXT_GENERATION = "text-generation"
    TEXT2TEXT_GENERATION = "text2text-generation"
    IMAGE_CLASSIFICATION = "image-classification"
    OBJECT_DETECTION = "object-detection"
    SEMANTIC_SEGMENTATION = "semantic-segmentation"
    DEPTH_ESTIMATION = "depth-estimation"
    IMAGE_TO_TEXT = "image-to-text"
    AUDIO_CLASSIFICATION = "audio-classification"
    SPEECH_RECOGNITION = "automatic-speech-recognition"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"


# Ends of class names, the longest match first; "Model" alone is the bare network.
_ENDINGS: dict[str, Task] = {
    "ForSequenceClassification": Task.TEXT_CLASSIFICATION,
    "ForTokenClassification": Task.TOKEN_CLASSIFICATION,
    "ForMaskedLM": Task.FILL_MASK,
    "ForQuestionAnswering": Task.QUESTION_ANSWERING,
    "ForMultipleChoice": Task.MULTIPLE_CHOICE,
    "ForCausalLM": Task.TEXT_GENERATION,
    "LMHeadModel": Task.TEXT_GENERATION,
    "ForConditionalGeneration": Task.TEXT2TEXT_GENERATION,
    "MTModel": Task.TEXT2TEXT_GENERATION,
    "ForImageClassification": Task.IMAGE_CLASSIFICATION,
    "ForObjectDetection": Task.OBJECT_DETECTION,
    "ForSemanticSegmentation": Task.SEMANTIC_SEGMENTATION,
    "ForUniversalSegmentation": Task.SEMANTIC_SEGMENTATION,
    "ForDepthEstimation": Task.DEPTH_ESTIMATION,
    "VisionEncoderDecoderModel": Task.IMAGE_TO_TEXT,
    "ForAudioClassification": Task.AUDIO_CLASSIFICATION,
    "ForCTC": Task.SPEECH_RECOGNITION,
    "ForSpeechSeq2Seq": Task.SPEECH_RECOGNITION,
    "Model": Task.FEATURE_EXTRACTION,
}
# Automatic classes that load a checkpoint for a task; several where one name covers several kinds of model.
_LOADERS: dict[Task, tuple[str, ...]] = {
    Task.FEATURE_EXTRACTION: ("AutoModel",),
    Task.TEXT_CLASSIFICATION: ("AutoModelForSequenceClassification",),
    Task.TOKEN_CLASSIFICATION: ("AutoModelForTokenClassification",),
    Task.FILL_MASK: ("AutoModelForMaskedLM",),
    Task.QUESTION_ANSWERING: ("AutoModelForQuestionAnswering",),
    Task.MULTIPLE_CHOICE: ("AutoModelForMultipleChoice",),
    Task.TEXT_GENERATION: ("AutoModelForCausalLM",),
    Task.TEXT2TEXT_GENERATION: ("AutoModelForSeq2SeqLM",),
    Task.IMAGE_CLASSIFICATION: ("AutoModelForImageClassification",),
    Task.OBJECT_DETECTION: ("AutoModelForObjectDetection",),
    Task.SEMANTIC_SEGMENTATION: ("AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation"),
    Task.DEPTH_ESTIMATION: ("AutoModelForDepthEstimation",),
    Task.IMAGE_TO_TEXT: ("AutoModelForImageTextToText",),
    Task.AUDIO_CLASSIFICATION: ("AutoModelForAudioClassification",),
    Task.SPEECH_RECOGNITION: ("AutoModelForCTC", "AutoModelForSpeechSeq2Seq"),
    Task.ZERO_SHOT_IMAGE_CLASSIFICATION: ("AutoModelForZeroShotImageClassification",),
}
_AUDIO_INPUTS = ("input_values", "input_features")


def parse_task(text: str | None) -> Task | None:
    """Read `--task`.

    Raises:
        ExportError: There is no such task.
    """
    if text is None:
        return None
    try:
        return Task(text)
    except ValueError:
        raise OptionError(f"there is no task {text!r}", expected=f"one of {', '.join(Task)}") from None


def task_of(model: Any) -> Task | None:
    """What a model is for, by the name of its class; None where the name does not tell."""
    name = type(model).__name__
    ending = max((e for e in _ENDINGS if name.endswith(e)), key=len, default=None)
    task = _ENDINGS[ending] if ending else None
    if getattr(model, "main_input_name", "") in _AUDIO_INPUTS:
        # Speech models call their classifier ForSequenceClassification and their generator ForConditionalGeneration.
        audio = {
            Task.TEXT_CLASSIFICATION: Task.AUDIO_CLASSIFICATION,
            Task.TEXT2TEXT_GENERATION: Task.SPEECH_RECOGNITION,
        }
        return audio.get(task, task) if task else None
    return task


def class_for(transformers: Any, config: Any, task: Task | None) -> Any:
    """The model class that loads a checkpoint: the one that config.json names, or the task's.

    The name in config.json comes from a stranger, so it has to be a model's.

    Raises:
        SourceError: transformers has no such model.
        ExportError: Models of this kind do not do the task.
    """
    if task is not None:
        return _class_for_task(transformers, config, task)
    name = next(iter(getattr(config, "architectures", None) or []), None)
    if name is None:
        return transformers.AutoModel
    try:
        found = getattr(transformers, str(name), None)
    except Exception as exc:  # transformers imports on access, and the import may fail in any way
        raise SourceError(f"transformers {transformers.__version__} cannot import {name} ({first_line(exc)})") from exc
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise SourceError(
            f"transformers {transformers.__version__} has no model {name}",
            expected="a known architecture in config.json",
        )
    return found


def _class_for_task(transformers: Any, config: Any, task: Task) -> Any:
    if task is Task.ZERO_SHOT_IMAGE_CLASSIFICATION:
        named = class_for(transformers, config, None)
        if hasattr(named, "get_image_features"):
            return named
    for loader in _LOADERS[task]:
        mapping = getattr(transformers, loader)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple | list) else found
    able = [t for t, names in _LOADERS.items() if any(_knows(transformers, name, config) for name in names)]
    raise OptionError(
        f"models of type {config.model_type} do no {task}",
        expected=f"one of {', '.join(able)}",
        hint="leave --task out to export what config.json names",
    )


def _knows(transformers: Any, loader: str, config: Any) -> bool:
    return type(config) in getattr(transformers, loader)._model_mapping
