"""The main job on real input: all-MiniLM-L6-v2 with its real weights, from the model directory to int8."""

import numpy as np
import pytest

import deploykit
from deploykit.artifact import Artifact

SENTENCES = [
    "A man is playing the guitar on a small stage.",
    "The stock market closed lower on Friday after a week of heavy losses in technology shares.",
    "No.",
    "Preheat the oven to 200 degrees, then mix flour, butter and sugar until the dough holds together when pressed.",
    "Where is the nearest train station?",
]


@pytest.fixture(scope="module")
def exported(minilm_dir, tmp_path_factory):
    return deploykit.export(minilm_dir, tmp_path_factory.mktemp("minilm") / "fp32")


@pytest.fixture(scope="module")
def torch_side(minilm_dir):
    import transformers

    model = transformers.AutoModel.from_pretrained(str(minilm_dir)).eval()
    return model, transformers.AutoTokenizer.from_pretrained(str(minilm_dir))


def encode(tokenizer, sentences, **options):
    made = tokenizer(sentences, padding=True, return_tensors="np", **options)
    return {name: np.asarray(made[name], np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}


def pooled(hidden, mask):
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def test_dynamic_dimensions_have_readable_names(exported):
    assert {str(s) for s in exported.signature.inputs} == {
        "input_ids: int64[batch, sequence]",
        "attention_mask: int64[batch, sequence]",
        "token_type_ids: int64[batch, sequence]",
    }
    assert str(exported.signature.outputs[0]) == "last_hidden_state: float32[batch, sequence, 384]"


@pytest.mark.parametrize("device", ["ort:cpu", "openvino:cpu"])
def test_equals_torch_at_lengths_that_the_export_did_not_see(exported, torch_side, device):
    import torch

    model, tokenizer = torch_side
    with deploykit.open_session(exported, device) as session:
        for sentences in (SENTENCES[:1], SENTENCES[2:3], SENTENCES, [" ".join(SENTENCES) * 3]):
            feeds = encode(tokenizer, sentences, truncation=True, max_length=256)
            with torch.no_grad():
                wanted = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}).last_hidden_state.numpy().ravel()
            found = session.run(feeds)["last_hidden_state"].ravel()
            cosine = wanted @ found / (np.linalg.norm(wanted) * np.linalg.norm(found))
            assert cosine >= 0.99999


def test_dynamic_int8_keeps_the_embeddings(exported, torch_side, tmp_path):
    int8 = deploykit.quantize_dynamic(exported.path, tmp_path / "int8", gate_seconds=0)
    assert int8.size_bytes < 0.35 * exported.size_bytes
    feeds = encode(torch_side[1], SENTENCES)
    embeddings = {}
    for name, artifact in (("fp32", exported), ("int8", Artifact.open(int8.path))):
        with deploykit.open_session(artifact) as session:
            embeddings[name] = pooled(session.run(feeds)["last_hidden_state"], feeds["attention_mask"])
    cosines = (embeddings["fp32"] * embeddings["int8"]).sum(1)
    assert cosines.mean() > 0.98
    assert cosines.min() > 0.95  # what the command itself guarantees; the one-word sentence is the worst


def test_fused_attention_keeps_the_numbers_at_hidden_rows(exported, tmp_path):
    made = deploykit.fuse(exported.path, tmp_path / "fused", gate_seconds=0)
    params = made.manifest.lineage[-1].params
    assert params["fused"] == {"Attention": 6, "BiasGelu": 6, "SkipLayerNormalization": 12}
    assert params["nodes_after"] < params["nodes_before"] / 3
    assert [r["verdict"] for r in made.manifest.evidence.parity] == ["passed", "passed"]
    ids = np.arange(21).reshape(3, 7) + 1000
    mask = np.array([[1] * 7, [1] * 3 + [0] * 4, [0] * 7], np.int64)  # the last row hides all
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    with deploykit.open_session(exported) as old, deploykit.open_session(made) as new:
        want, have = old.run(feeds)["last_hidden_state"], new.run(feeds)["last_hidden_state"]
    assert np.isfinite(want).all()
    np.testing.assert_allclose(have, want, rtol=1e-3, atol=1e-4)
