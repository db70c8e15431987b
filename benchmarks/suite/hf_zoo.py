"""Hugging Face architectures, small, from configs, with random weights under which outputs react to inputs.

Where layers are alike, there is one: a second one stays only where layers share something (ALBERT's weights, T5's table
of positions, Swin's shifted windows) or have a cache each (GPT-2, Whisper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf

TEXT = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SPEECH = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 5, 5), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_length": 2,
}  # fmt: skip
DECODER = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}


def resnet() -> Any:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")
    config.image_size = 32
    return tf.ResNetForImageClassification(config)


def mobilenet_v2() -> Any:
    return tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(image_size=64, depth_multiplier=0.35))


def efficientnet() -> Any:
    config = tf.EfficientNetConfig(
        image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, in_channels=[32, 16, 24],
        out_channels=[16, 24, 40], kernel_sizes=[3, 3, 5], strides=[1, 2, 2], num_block_repeats=[1, 2, 1],
        expand_ratios=[1, 6, 6], depthwise_padding=[],
    )  # fmt: skip
    return tf.EfficientNetForImageClassification(config)


def vit() -> Any:
    return tf.ViTForImageClassification(tf.ViTConfig(**_vision()))


def swin() -> Any:
    config = tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4)
    return tf.SwinForImageClassification(config)


def convnext() -> Any:
    config = tf.ConvNextConfig(
        image_size=32, hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, layer_scale_init_value=1.0
    )
    return tf.ConvNextForImageClassification(config)


def segformer() -> Any:
    config = tf.SegformerConfig(
        image_size=64, hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[4, 2], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5,
    )  # fmt: skip
    return tf.SegformerForSemanticSegmentation(config)


def detr() -> Any:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = tf.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
        num_queries=7, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_labels=5,
    )  # fmt: skip
    config.image_size = 64
    return tf.DetrForObjectDetection(config)


def bert() -> Any:
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, max_position_embeddings=64, num_labels=4))


def distilbert() -> Any:
    config = tf.DistilBertConfig(
        vocab_size=97, dim=32, n_layers=1, n_heads=4, hidden_dim=64, max_position_embeddings=64
    )
    return tf.DistilBertForTokenClassification(config)


def roberta() -> Any:
    return tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT, max_position_embeddings=64))


def albert() -> Any:
    config = tf.AlbertConfig(
        **TEXT | {"num_hidden_layers": 2}, embedding_size=16, max_position_embeddings=64
    )  # one layer, twice
    return tf.AlbertForQuestionAnswering(config)


def deberta_v2() -> Any:
    config = tf.DebertaV2Config(
        **TEXT, max_position_embeddings=64, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm", share_att_key=True,
    )  # fmt: skip
    return tf.DebertaV2ForSequenceClassification(config)


def t5() -> Any:
    config = tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def gpt2() -> Any:
    config = tf.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config)


def llama() -> Any:
    config = tf.LlamaConfig(**TEXT, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
    return tf.LlamaForCausalLM(config)


def wav2vec2() -> Any:
    return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SPEECH, feat_extract_norm="layer", do_stable_layer_norm=True))


def hubert() -> Any:
    return tf.HubertForSequenceClassification(tf.HubertConfig(**SPEECH, num_labels=4, classifier_proj_size=16))


def whisper() -> Any:
    config = tf.WhisperConfig(
        vocab_size=97, num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50,
        max_target_positions=48, suppress_tokens=None, begin_suppress_tokens=None, **DECODER,
    )  # fmt: skip
    return tf.WhisperForConditionalGeneration(config)


def clip() -> Any:
    text = {**TEXT, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 96, "pad_token_id": 0}
    return tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=_vision(), projection_dim=16))


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip


ARCHITECTURES: Mapping[str, Callable[[], Any]] = {
    "ResNet": resnet, "MobileNetV2": mobilenet_v2, "EfficientNet": efficientnet, "ViT": vit, "Swin": swin,
    "ConvNeXt": convnext, "SegFormer": segformer, "DETR": detr, "BERT": bert, "DistilBERT": distilbert,
    "RoBERTa": roberta, "ALBERT": albert, "DeBERTa-v2": deberta_v2, "T5": t5, "GPT-2": gpt2, "Llama": llama,
    "Wav2Vec2": wav2vec2, "HuBERT": hubert, "Whisper": whisper, "CLIP": clip,
}  # fmt: skip


# What models become that are not one graph.
PARTS: Mapping[str, tuple[str, ...]] = {
    "T5": ("encoder", "decoder"),
    "Whisper": ("encoder", "decoder"),
    "CLIP": ("text", "image"),
}


def save(name: str, folder: Path) -> Path:
    """Write a model directory as `save_pretrained` does, with weights that keep signals at unit size."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    _scale(model)
    model.save_pretrained(folder)
    return folder


def _scale(model: torch.nn.Module) -> None:
    """Weights of variance 2 / fan-in and embeddings of variance 1; the library's 0.02 leaves outputs all alike."""
    generator = torch.Generator().manual_seed(0)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 1.0 if id(parameter) in tables else (2 / parameter[0].numel()) ** 0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1, generator=generator)
    if any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()):
        _settle(model, generator)


def _settle(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Let batch normalization see pictures, as training does."""
    size = model.config.image_size
    model.train()
    with torch.no_grad():
        for _ in range(30):
            light = torch.randn((8, 3, 1, 1), generator=generator)
            model(pixel_values=torch.randn((8, 3, size, size), generator=generator) + light)
    model.eval()
