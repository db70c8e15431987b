"""Generation with exported graphs: the same tokens as `generate`, step by step, in both runtimes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import Artifact, export, export_parts, open_session
from deploykit.errors import ArtifactError, ExportError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "suite"))
zoo: Any = importlib.import_module("hf_zoo")
sys.path.pop(0)

STEPS = 8
RUNTIMES = ("ort:cpu", "openvino:cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`made(name)`: directory of a model, its artifacts by part; once for all tests."""
    known: dict[str, tuple[Path, dict[str, Artifact]]] = {}

    def build(name: str) -> tuple[Path, dict[str, Artifact]]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            source = zoo.save(name, folder / "source")
            known[name] = source, export_parts(source, folder / "out", exporter="torchscript")
        return known[name]

    return build


def empty_past(artifact: Artifact, batch: int) -> dict[str, Any]:
    past = [s for s in artifact.signature.inputs if s.shape and "past_sequence" in s.shape]
    return {s.name: np.zeros(s.concrete({"batch": batch, "past_sequence": 0}), np.float32) for s in past}


def expected_tokens(source: Path, kind: str, **inputs: Any) -> Any:
    import torch
    import transformers

    model = getattr(transformers, kind).from_pretrained(source).eval()
    tensors = {n: torch.from_numpy(a) for n, a in inputs.items()}
    out = model.generate(**tensors, max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0, num_beams=1)
    return out.numpy()


@pytest.mark.parametrize("device", RUNTIMES)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_a_decoder_generates_what_transformers_generates(made: Any, name: str, device: str) -> None:
    source, parts = made(name)
    artifact = parts[""]
    ids = np.random.default_rng(3).integers(3, 97, (2, 6))
    mask = np.ones_like(ids)
    mask[1, :2] = 0  # a shorter prompt, padded on the left
    wanted = expected_tokens(source, "AutoModelForCausalLM", input_ids=ids, attention_mask=mask)[:, 6:]
    tokens, step, past = [], ids, empty_past(artifact, 2)
    with open_session(artifact.model_path, device) as session:
        for _ in range(STEPS):
            positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -step.shape[1] :]
            feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions, **past}
            out = session.run(feeds)
            step = out["logits"][:, -1].argmax(-1)[:, None]
            tokens.append(step)
            mask = np.concatenate([mask, np.ones_like(step)], 1)
            past = {name: out[name.replace("past_key_values", "present")] for name in past}
    assert np.array_equal(np.concatenate(tokens, 1), wanted)


@pytest.mark.parametrize("device", RUNTIMES)
@pytest.mark.parametrize("name", ["T5", "Whisper"])
def test_an_encoder_and_a_decoder_generate_what_transformers_generates(made: Any, name: str, device: str) -> None:
    source, parts = made(name)
    assert set(parts) == {"encoder", "decoder"}
    rng = np.random.default_rng(5)
    if name == "T5":
        given: dict[str, Any] = {"input_ids": rng.integers(3, 97, (2, 7)), "attention_mask": np.ones((2, 7), np.int64)}
        given["attention_mask"][1, 5:] = 0
        kind, start = "AutoModelForSeq2SeqLM", 0
    else:
        given = {"input_features": rng.standard_normal((2, 16, 100)).astype(np.float32)}
        kind, start = "AutoModelForSpeechSeq2Seq", 1
    wanted = expected_tokens(source, kind, **given)[:, -STEPS:]
    with open_session(parts["encoder"].model_path, device) as session:
        encoded = session.run(given)
    cross = {n.replace("present", "past_key_values"): a for n, a in encoded.items() if n.startswith("present")}
    if "attention_mask" in given:
        cross["encoder_attention_mask"] = given["attention_mask"]
    tokens, step, past = [], np.full((2, 1), start), empty_past(parts["decoder"], 2)
    with open_session(parts["decoder"].model_path, device) as session:
        for _ in range(STEPS):
            out = session.run({"input_ids": step, **past, **cross})
            step = out["logits"][:, -1].argmax(-1)[:, None]
            tokens.append(step)
            past = {n: out[n.replace("past_key_values", "present")] for n in past}
    assert np.array_equal(np.concatenate(tokens, 1), wanted)


def test_parts_are_whole_artifacts_in_one_directory(made: Any) -> None:
    _, parts = made("T5")
    folder = parts["encoder"].path.parent
    assert sorted(p.name for p in folder.iterdir()) == ["decoder", "encoder"]
    for name, part in parts.items():
        assert Artifact.open(folder / name).digest == part.digest
        assert part.manifest.lineage[0].params["part"] == name
        assert part.manifest.evidence.parity[0]["verdict"] == "passed"
    assert str(parts["decoder"].signature.outputs[1].shape) == str(("batch", 4, "past_sequence + sequence", 8))


def test_a_directory_of_parts_is_no_artifact(made: Any) -> None:
    _, parts = made("T5")
    with pytest.raises(ArtifactError, match=r"holds 2 artifacts: decoder, encoder.*/decoder"):
        Artifact.open(parts["encoder"].path.parent)


def test_one_part_alone(made: Any, tmp_path: Path) -> None:
    source, parts = made("T5")
    alone = export(source, tmp_path / "encoder", part="encoder", exporter="torchscript")
    assert alone.signature == parts["encoder"].signature


def test_several_graphs_where_one_is_wanted(made: Any, tmp_path: Path) -> None:
    source, _ = made("T5")
    with pytest.raises(ExportError, match="becomes 2 graphs: encoder, decoder"):
        export(source, tmp_path / "out")
    with pytest.raises(ExportError, match=r"there is no part 'middle'.*encoder, decoder"):
        export(source, tmp_path / "out", part="middle")
    assert not list(tmp_path.iterdir())


def test_a_failing_part_leaves_nothing(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit import exporting

    source, _ = made("T5")
    whole = exporting._export_graph
    done = []

    def fails_second(*args: Any, **kwargs: Any) -> Any:
        if done:
            raise ExportError("the second graph fails")
        done.append(whole(*args, **kwargs))
        return done[0]

    monkeypatch.setattr(exporting, "_export_graph", fails_second)
    with pytest.raises(ExportError, match="second graph"):
        export_parts(source, tmp_path / "out", exporter="torchscript")
    assert done
    assert not list(tmp_path.iterdir()), "the first part was left"


def test_a_cache_that_changes_the_numbers_is_refused(made: Any, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.exporters import hf_generation

    source, _ = made("GPT-2")
    honest = hf_generation.presents
    monkeypatch.setattr(
        hf_generation, "presents", lambda cache, slots: {n: t * 0.9 for n, t in honest(cache, slots).items()}
    )
    with pytest.raises(ExportError, match="other numbers with a key-value cache"):
        opened(source)
