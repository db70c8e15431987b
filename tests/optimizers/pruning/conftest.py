"""Small networks with all that can be pruned, and what stands in the way."""

import copy

import pytest
import torch
from torch import nn

from deploykit.optimizers.pruning import Subject


class Block(nn.Module):
    """Depthwise and pointwise, squeezed and excited, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.squeeze = nn.Sequential(nn.Conv2d(2 * width, 8, 1), nn.ReLU(), nn.Conv2d(8, 2 * width, 1), nn.Sigmoid())
        self.project = nn.Conv2d(2 * width, width, 1)

    def forward(self, x):
        y = self.depthwise(self.expand(x)).relu()
        return x + self.project(y * self.squeeze(y.mean((2, 3), keepdim=True)))


class Residual(nn.Module):
    """A shortcut over a block, a grouped convolution, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = Block(16)
        self.grouped = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, stride=2, groups=4), nn.BatchNorm2d(32), nn.ReLU())
        self.hidden = nn.Linear(32 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, image):
        return self.head(self.hidden(self.grouped(self.block(self.stem(image))).flatten(1)).relu())


def run(module, batch):
    return module(**batch)


def settled(module):
    """In evaluation mode, with statistics and biases that are not all alike."""
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.2)
            part.running_var.uniform_(0.5, 2)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return module.eval()


@pytest.fixture(scope="module")
def residual_net():
    torch.manual_seed(0)
    return settled(Residual())


@pytest.fixture
def residual(residual_net):
    torch.manual_seed(2)
    return Subject(copy.deepcopy(residual_net), {"image": torch.randn(2, 1, 8, 8)}, run)


@pytest.fixture(scope="module")
def bert_net():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    net = BertForSequenceClassification(config)
    # As it is drawn, its heads hardly differ from nothing.
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if weight.ndim == 2:
                weight.mul_(4 if "embeddings" not in name else 1)
    return net.eval()


@pytest.fixture
def bert(bert_net):
    torch.manual_seed(2)
    example = {"input_ids": torch.randint(0, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}
    example["attention_mask"][1, 8:] = 0
    return Subject(copy.deepcopy(bert_net), example, run)
