"""Channels, heads and neurons really go, exactly those, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from deploykit.errors import OptimizationError, SpeedError
from deploykit.optimizers.pruning import Aim, PruneConfig, Subject, count_layers, count_parameters, prune_structured
from deploykit.optimizers.pruning.groups import find_structure
from deploykit.optimizers.pruning.surgery import silence, take_out

pytestmark = pytest.mark.usefixtures("one_thread")


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


class Plain(nn.Module):
    """Convolutions in a row around what a test puts between them."""

    def __init__(self, between, after):
        super().__init__()
        self.first, self.between, self.last = nn.Conv2d(3, 16, 3, padding=1), between, nn.Conv2d(after, 16, 1)
        self.inner, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.last(self.between(self.first(x)).relu()).relu()
        return self.head(self.inner(x.mean((2, 3))).relu())


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return torch.cat([self.one(x), x, self.two(x)], 1)


class Chunks(nn.Module):
    def forward(self, x):
        first, second = x.chunk(2, 1)
        return first * second.sigmoid()


@pytest.mark.parametrize(
    ("between", "after", "free"),
    [
        (Concat(), 40, {"first", "between.one", "between.two"}),
        (nn.ConvTranspose2d(16, 24, 2, stride=2), 24, {"first", "between"}),
        (nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)), 16, {"between.0"}),
        (nn.InstanceNorm2d(16, affine=True), 16, {"first"}),
        (nn.PReLU(16), 16, {"first"}),
        (nn.GroupNorm(4, 16), 16, set()),
        (nn.PixelShuffle(2), 4, set()),
        (Chunks(), 8, set()),
    ],
    ids=["concat", "transposed", "depthwise", "instance norm", "prelu", "group norm", "pixel shuffle", "chunk"],
)
def test_what_may_go_between_layers_of_every_kind(between, after, free):
    """What cannot be followed stays; what goes leaves the outputs of zeros, and the last layer's outputs stay."""
    torch.manual_seed(0)
    net = Plain(copy.deepcopy(between), after).eval()
    subject = Subject(net, {"x": torch.randn(2, 3, 6, 6)}, run)
    structure = find_structure(subject)
    assert set(structure.groups) - {"last", "inner"} == free
    assert "output of the module" in structure.kept["head"]
    prune_structured(subject, PruneConfig(ratio=0.4, round_to=2, allocation="uniform"))
    assert net.first.out_channels == (10 if free else 16)
    assert net.head.out_features == 4
    assert net(torch.randn(5, 3, 7, 7)).shape == (5, 4)


def test_an_example_of_zeros_proves_nothing_and_others_do():
    """Without biases every module gives zeros for zeros, so that a wrong group would not show."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed, self.last = nn.Conv2d(3, 16, 1, bias=False), nn.Conv2d(16, 16, 1, bias=False)
            self.head = nn.Linear(16, 2, bias=False)

        def forward(self, x):
            x = self.mixed(x)
            x = x.reshape(len(x), 2, 8, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
            return self.head(self.last(x).mean((2, 3)))

    torch.manual_seed(0)
    net = Mixed().eval()
    zeros, others = {"x": torch.zeros(2, 3, 4, 4)}, ({"x": torch.randn(2, 3, 4, 4)},)
    assert set(find_structure(Subject(net, zeros, run, (), others)).groups) == {"last"}
    subject = Subject(net, zeros, run, (), others)
    done = prune_structured(subject, PruneConfig(ratio=0.5, round_to=4))
    assert done.sensitivity["last"] > 0


def test_masked_scores_are_compared_where_they_are_finite():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.first(x).relu()).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    torch.manual_seed(0)
    done = prune_structured(Subject(Scores().eval(), {"x": torch.randn(3, 8)}, run), PruneConfig(ratio=0.5, round_to=8))
    assert done.channels == {"first": (32, 16)}
    assert 0 < done.sensitivity["first"] < 10


def test_channels_that_multiples_do_not_let_go(residual):
    """The squeezing layer has 8 channels: in multiples of 16 it loses none, and that is said."""
    done = prune_structured(residual, PruneConfig(ratio=0.3, round_to=16))
    assert done.channels["block.squeeze.0"] == (8, 8)
    assert "nothing of its 8 channels can go in multiples of 16" in done.kept["block.squeeze.0"]
    measure = macs_of(residual)
    start = measure(residual.module)
    with pytest.raises(OptimizationError, match=r"in multiples of 512.*--round-to 256"):
        prune_structured(residual, PruneConfig(round_to=512), aim=Aim(start / 2, start, measure))


def test_a_forward_that_minds_how_many_are_left_is_an_error():
    class Halves(nn.Module):
        """Runs with all channels and with a quarter gone, as in the trial."""

        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)

        def forward(self, x):
            x = self.first(x).relu()
            return self.head(x.reshape(len(x), 8, x.shape[1] // 8).reshape(len(x), -1))

    torch.manual_seed(0)
    subject = Subject(Halves().eval(), {"x": torch.randn(3, 8)}, run)
    with pytest.raises(OptimizationError, match=r"does not run with fewer channels in first.*--keep first"):
        prune_structured(subject, PruneConfig(ratio=0.4, round_to=1))


@pytest.mark.parametrize("round_to", [1, 64])
def test_the_search_aims_at_the_target_and_measures_no_module_twice(round_to):
    """A careful measurement at the edge of what is allowed would leave no room for noise in the proof."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 8)).eval()
    subject = Subject(net, {"input": torch.randn(4, 8)}, run)
    quick, seen = macs_of(subject), []
    start = quick(net)

    def careful(module):
        seen.append(quick(module))
        return 1.045 * seen[-1]

    # In multiples of 64, 192 are left, or 256: the quick measurement would take the latter.
    prune_structured(subject, PruneConfig(round_to=round_to), aim=Aim(start / 2, start, quick, careful))
    assert len(seen) == len(set(seen))
    if round_to == 1:
        assert 1.045 * quick(net) == pytest.approx(start / 2, rel=0.025)
        assert len(seen) == 2
    else:
        assert net[0].out_features == 256
