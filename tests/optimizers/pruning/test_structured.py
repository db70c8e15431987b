"""Channels, heads and neurons really go, exactly those, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError, SpeedError
from deploykit.optimizers.pruning import Aim, PruneConfig, Subject, count_layers, count_parameters, prune_structured
from deploykit.optimizers.pruning.groups import find_structure
from deploykit.optimizers.pruning.surgery import silence, take_out


def run(module, batch):
    return module(**batch)


def macs_of(subject):
    return lambda module: float(sum(layer.macs for layer in count_layers(module, subject.example, run).values()))


def test_a_residual_network_with_depthwise_and_grouped_convolutions_gets_smaller(residual):
    before = count_parameters(residual.module)
    done = prune_structured(residual, PruneConfig(ratio=0.5, round_to=4))
    assert done.parameters == (before, count_parameters(residual.module))
    assert done.parameters[1] < 0.7 * before
    assert done.macs[1] < 0.7 * done.macs[0]
    assert done.ratio == pytest.approx(0.5, abs=0.1)
    net = residual.module
    assert net.stem[0].out_channels == net.block.project.out_channels == net.grouped[0].in_channels  # the shortcut
    assert net.block.depthwise.groups == net.block.expand[0].out_channels == net.block.squeeze[2].out_channels
    assert net.grouped[0].groups == 4
    assert all(after % 4 == 0 for _, after in done.channels.values())
    assert net.head.out_features == 10
    assert net(torch.randn(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("name", ["residual", "bert"])
def test_what_goes_is_what_zeros_would_silence(name, request):
    """On other inputs than those that the pruning itself compares on."""
    subject = request.getfixturevalue(name)
    structure = find_structure(subject)
    chosen = {n: list(range(0, group.units, 2))[: max(1, group.units // 3)] for n, group in structure.groups.items()}
    twin = copy.deepcopy(subject.module)
    silence(subject.of(twin), structure.groups, chosen)
    take_out(subject, structure.groups, chosen)
    torch.manual_seed(7)
    if name == "bert":
        other = {"input_ids": torch.randint(0, 50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.int64)}
    else:
        other = {"image": torch.randn(3, 1, 8, 8)}
    (want,), (have,) = (Subject(module, other, run).outputs() for module in (twin, subject.module))
    whole = Subject(copy.deepcopy(request.getfixturevalue(f"{name}_net")), other, run).outputs()[0]
    assert torch.allclose(want, have, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(want, whole, atol=1e-2)  # the zeros did something


def test_heads_and_neurons_of_a_transformer_go_and_its_width_stays(bert):
    before = count_parameters(bert.module)
    done = prune_structured(bert, PruneConfig(ratio=0.5, round_to=8))
    assert done.parameters[1] < before
    assert len(done.heads) == 2
    assert sum(after for _, after in done.heads.values()) < sum(start for start, _ in done.heads.values())
    for layer in bert.module.bert.encoder.layer:
        attention = layer.attention.self
        assert attention.query.out_features == attention.num_attention_heads * 8 == attention.all_head_size
        assert attention.value.out_features == layer.attention.output.dense.in_features == attention.all_head_size
        assert layer.attention.output.dense.out_features == 32
        assert layer.intermediate.dense.out_features == layer.output.dense.in_features
        assert layer.intermediate.dense.out_features % 8 == 0
    assert any("LayerNorm" in why for why in done.kept.values())
    assert bert.outputs()[0].shape == (2, 3)


def test_a_recurrent_layer_is_refused_by_name_unless_it_is_kept():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
            self.memory = nn.LSTM(8, 16, batch_first=True)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.memory(self.before(x))[0])

    torch.manual_seed(0)
    subject = Subject(Tagger().eval(), {"x": torch.randn(2, 5, 8)}, run)
    with pytest.raises(OptimizationError, match=r"memory is a LSTM.*--keep memory"):
        prune_structured(subject, PruneConfig(ratio=0.5))
    kept = Subject(subject.module, subject.example, run, keep=("memory",))
    done = prune_structured(kept, PruneConfig(ratio=0.5, round_to=4))
    assert done.channels == {"before.0": (32, 16)}
    assert subject.module.memory.hidden_size == 16
    assert subject.module.before[2].out_features == 8


def test_what_the_graph_understands_wrongly_stays_as_it_is():
    class Shuffled(nn.Module):
        """Its halves are exchanged channel by channel, which no index of a channel survives."""

        def __init__(self):
            super().__init__()
            self.mixed, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
            self.plain, self.head = nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, x):
            x = self.mixed(x)
            x = x.reshape(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
            return self.head(self.plain(self.last(x).mean((2, 3))).relu())

    torch.manual_seed(0)
    subject = Subject(Shuffled().eval(), {"x": torch.randn(2, 3, 4, 4)}, run)
    structure = find_structure(subject)
    assert set(structure.groups) == {"last", "plain"}
    assert "mixed" in structure.kept
    assert "output of the module" in structure.kept["head"]


def test_taylor_finds_the_channels_that_nothing_minds(residual):
    """Large weights that nobody reads: by magnitude they would stay, by the gradient they go, and nothing changes."""
    net = residual.module
    idle = list(range(0, 64, 2))
    with torch.no_grad():
        net.hidden.weight[idle] *= 50
        net.head.weight[:, idle] = 0
    inputs = torch.randn(6, 1, 8, 8)
    before = net(inputs)

    def losses(module):
        for part in inputs.split(3):
            yield nn.functional.cross_entropy(module(part), torch.tensor([0, 1, 2]))

    keep = ("stem", "block", "grouped")
    only = Subject(net, residual.example, run, keep=keep)
    prune_structured(only, PruneConfig(ratio=0.5, round_to=1, importance="taylor"), losses=losses)
    assert net.hidden.out_features == 32
    assert torch.allclose(net(inputs), before, atol=1e-4)
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(OptimizationError, match="labelled data"):
        prune_structured(only, PruneConfig(ratio=0.5, importance="taylor"))


def test_sensitive_groups_lose_less(residual):
    """Of two equal groups, the one whose silence moves the outputs most keeps most."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet = (nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)) for _ in range(2))

        def forward(self, x):
            return 10 * self.loud(x) + 0.1 * self.quiet(x)

    torch.manual_seed(0)
    subject = Subject(Two().eval(), {"x": torch.randn(16, 8)}, run)
    done = prune_structured(subject, PruneConfig(ratio=0.4, round_to=4))
    assert done.sensitivity["loud.0"] > 100 * done.sensitivity["quiet.0"]
    assert done.channels["quiet.0"][1] < done.channels["loud.0"][1]
    uniform = Subject(Two().eval(), subject.example, run)
    same = prune_structured(uniform, PruneConfig(ratio=0.5, round_to=4, allocation="uniform"))
    assert same.channels == {"loud.0": (32, 16), "quiet.0": (32, 16)}


def test_a_latency_is_searched_and_met_in_steps_with_recovery(residual):
    measure = macs_of(residual)
    start = measure(residual.module)
    steps = []

    def recover(module, step):
        steps.append((step, measure(module)))
        with torch.no_grad():  # a training moves the weights, and with them the importance
            for p in module.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)

    aim = Aim(start / 2, start, measure)
    done = prune_structured(residual, PruneConfig(steps=2, round_to=1), aim=aim, recover=recover)
    assert [step for step, _ in steps] == [1, 2]
    assert start > steps[0][1] > steps[1][1]
    assert measure(residual.module) == pytest.approx(start / 2, rel=0.05)
    assert len(done.probes) >= 2


def test_a_latency_out_of_reach_is_an_error_or_said(residual):
    measure = macs_of(residual)
    start = measure(residual.module)
    twin = residual.of(copy.deepcopy(residual.module))
    with pytest.raises(SpeedError, match="out of reach"):
        prune_structured(residual, PruneConfig(round_to=1), aim=Aim(start / 1000, start, measure))
    loose = Aim(start / 1000, start, measure, required=False)
    done = prune_structured(twin, PruneConfig(round_to=1), aim=loose)
    assert done.ratio > 0.7
    with pytest.raises(OptimizationError, match="nothing has to go"):
        prune_structured(residual, PruneConfig(), aim=Aim(2 * start, start, measure))


def test_a_careful_measurement_corrects_the_quick_one(residual):
    """The quick one is 20 % too fast; what counts is the careful one."""
    true = macs_of(residual)
    start = true(residual.module)
    aim = Aim(start / 2, start, lambda module: 0.8 * true(module), true)
    prune_structured(residual, PruneConfig(round_to=1), aim=aim)
    assert true(residual.module) == pytest.approx(start / 2, rel=0.06)


def test_ratios_that_cannot_be_and_flags_that_stay(residual):
    residual.module.head.weight.requires_grad_(False)
    with pytest.raises(OptimizationError, match=r"out of reach: 0\.\d+ of the channels"):
        prune_structured(residual, PruneConfig(ratio=0.95, round_to=4))
    with pytest.raises(OptimizationError, match="takes nothing out"):
        prune_structured(residual, PruneConfig(ratio=0.01, round_to=16))
    prune_structured(residual, PruneConfig(ratio=0.3, round_to=4))
    assert not residual.module.head.weight.requires_grad
    assert residual.module.hidden.weight.requires_grad


def test_groups_without_end_are_left_alone():
    """Rotary positions, beside a shortcut: Torch-Pruning's graph would go round in circles."""

    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned, self.last = nn.Linear(8, 16), nn.Linear(16, 16)
            self.plain, self.head = nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, x):
            x = self.turned(x)
            x = 0.8 * x + 0.6 * torch.cat([-x[..., 8:], x[..., :8]], -1)
            return self.head(self.plain(self.last(x)).relu())

    torch.manual_seed(0)
    subject = Subject(Rotary().eval(), {"x": torch.randn(2, 5, 8)}, run)
    structure = find_structure(subject)
    assert set(structure.groups) == {"last", "plain"}
    assert structure.kept["turned"] == "its channels cannot be followed"
