"""The settings that the experiments must have, taken from the papers and the code that the experiments reproduce.

Marks in the comments give the source of a setting. In the sections on papers, a setting without a mark is from the paper.

- [paper]: the paper states it; the mark distinguishes it from settings with another source in the same comment.
- [code]: only the code states it, that is, the authors' code or the implementation that the comment names.
- [choice]: neither specifies it, so the project chose it.

A setting that the table does not name must have its component's default, so no experiment can change it unnoticed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from fa_bench.registry.registries import ALGORITHMS

#: Settings by their key on the command line, such as ``optimizer.lr``.
Settings = dict[str, Any]
#: A case is a pair (conditions, settings); the settings apply to the runs that meet the conditions. A tuple in the conditions
#: lists alternatives.
Case = tuple[Mapping[str, Any], Settings]


@dataclasses.dataclass(frozen=True)
class Preset:
    """The runs of one experiment, and their settings.

    Attributes:
        sweep: parts of the sweep. A part maps each swept key to its values, and stands for all combinations of them.
        common: settings of all runs.
        cases: settings of some runs; a later case overrides an earlier one.
    """

    sweep: list[dict[str, list[Any]]]
    common: Settings
    cases: list[Case] = dataclasses.field(default_factory=list)

    def runs(self) -> Iterator[tuple[Settings, list[int]]]:
        """Yield the settings of every run, without the seed, and the seeds with which the run is repeated."""
        for part in self.sweep:
            swept = {key: values for key, values in part.items() if key != "seed"}
            for values in itertools.product(*swept.values()):
                chosen = dict(zip(swept, values, strict=True))
                settings: Settings = {}
                for conditions, added in [*COMPONENTS, ({}, self.common), *self.cases, ({}, chosen)]:
                    if _meets({"optimizer": "sgd"} | self.common | chosen, conditions):
                        settings |= added
                yield settings, list(part["seed"])


def _meets(chosen: Settings, conditions: Mapping[str, Any]) -> bool:
    return all(chosen.get(key) in (wanted if isinstance(wanted, tuple) else (wanted,)) for key, wanted in conditions.items())


def _keys(prefix: str, **settings: Any) -> Settings:
    return {f"{prefix}.{key}": value for key, value in settings.items()}


def _multistep(milestones: list[int], gamma: float) -> Settings:
    return _keys("optimizer.schedule", name="multistep", milestones=milestones, gamma=gamma)


CONSTANT = _keys("optimizer.schedule", name="constant")
COSINE = _keys("optimizer.schedule", name="cosine", min_lr=0.0)
PLAIN_MLP = _keys("architecture", activation="relu", batch_norm=False, output_norm=False)
STAGES_18, STAGES_34 = [2, 2, 2, 2], [3, 4, 6, 3]
ASAP_RULES = ("asap", "asfp", "asfp_lc")
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}  # Kingma and Ba 2014

#: Settings of components that apply to every experiment, unless the experiment's own settings below differ.
COMPONENTS: list[Case] = [
    # In section 3 of the PFA paper, the net is 784-512-512-10, with ReLU and without normalisation.
    ({"architecture": "mlp"}, _keys("architecture", widths=[512, 512]) | PLAIN_MLP),
    # In Table 3 of the DKP paper, the net has two convolutions of 32 channels and 128 hidden neurons; its 6272 features imply the
    # padding.
    ({"architecture": "conv2"}, _keys("architecture", channels=32, hidden=128, padding=None)),
    # In section 3.2 of the DKP paper, the net is AlexNet with torchvision's layer sizes and normalisation before every
    # activation. The dropout rate is given only in the code [code].
    ({"architecture": "dkp_alexnet"}, _keys("architecture", width=64, hidden=4096, linear_norm=True, dropout=0.5)),
    # The nets of the ASAP paper are from appendix C; the normalised logits are from the released code [code].
    ({"architecture": "asap_alexnet"}, _keys("architecture", width=64, hidden=1024, output_norm=True)),
    ({"architecture": "resnet18"}, _keys("architecture", width=64, blocks=STAGES_18, shortcuts=True, output_norm=True)),
    ({"architecture": "resnet34"}, _keys("architecture", width=64, blocks=STAGES_34, shortcuts=True, output_norm=True)),
    # The small ResNet and the ResNets for ImageNet are from He et al. 2016.
    ({"architecture": "resnet20"}, _keys("architecture", width=16, blocks=3, shortcuts=True)),
    ({"architecture": "resnet18_imagenet"}, _keys("architecture", width=64, blocks=STAGES_18, bn="before")),
    ({"architecture": "resnet50_imagenet"}, _keys("architecture", width=64, blocks=STAGES_34, bn="before")),
    # In appendix A of the PFA paper, the expansion ratio is 10 and the initialisation is Glorot's; the ratio of PFA-o is from the
    # code [code].
    ({"algorithm": "pfa"}, _keys("algorithm", ratio=10.0, r_init="xavier_uniform", density=1.0)),
    ({"algorithm": "pfa_o"}, _keys("algorithm", ratio=1.0, r_init="xavier_uniform")),
    # In section 3 of the ASAP paper, two layers share an activation, max-pooling matches shapes, and the first layer is frozen.
    # The feedback of convolutions is sampled like torch's default weights, and that of fully connected layers is uniform in [-1,
    # 1) [code].
    (
        {"algorithm": ASAP_RULES},
        _keys(
            "algorithm",
            k=2,
            match="max_pool",
            linear="auto",
            b_init="pytorch",
            linear_b_init="uniform_one",
            transport=False,
            freeze_stem=True,
        ),
    ),
    ({"algorithm": "asfp_lc"}, _keys("algorithm", pool=2, cuts=None)),  # appendix B: average pooling to 2x2
    # The ASAP paper compares ASAP with the local rules of Mostafa et al. 2018 (local_error), Nøkland and Eidnes 2019 (predsim)
    # and Belilovsky et al. 2020 (dgl, with "mlp-sr" auxiliary nets). kaiming_uniform and the 4096 features of local_error are the
    # project's choice [choice].
    ({"algorithm": "local_error"}, _keys("algorithm", m_init="kaiming_uniform", features=4096, separate=False, cuts=None)),
    (
        {"algorithm": "predsim"},
        _keys("algorithm", loss="predsim", beta=0.99, decoder_size=4096, decoder_init="zeros", decoder_bias=True, cuts=None),
    ),
    # Deep supervision is the project's own reference, with the classifiers of predsim and losses of equal weight [choice].
    ({"algorithm": "bp_deepsup"}, _keys("algorithm", weight=1.0, decoder_size=4096, decoder_init="zeros", cuts=None)),
    ({"algorithm": "dgl"}, _keys("algorithm", auxiliary_net="mlp_sr", cuts=None)),
    # In DFA, every neuron of a hidden activation has its own column of feedback, unless a case or a sweep below differs.
    ({"algorithm": "dfa"}, _keys("algorithm", form="neuron", cuts=None, density=1.0)),
    ({"algorithm": "fa"}, _keys("algorithm", linear_b_init=None, density=1.0, plain_last=False)),
    ({"algorithm": "kp"}, _keys("algorithm", b_lr_scale=1.0, plain_last=False)),  # W and B have the same learning rate
    # In the code of the PFA paper, the feedback of USF is the sign of the weight times the standard deviation of Glorot's
    # initialisation [code].
    ({"algorithm": "usf"}, _keys("algorithm", scale="xavier", plain_last=False, density=1.0)),
    # In section 3.1 of the DKP paper, backward matrices are sampled with Kaiming's initialisation. The matrices of DRTP follow
    # the code of Frenkel et al. [code].
    ({"algorithm": "dkp"}, _keys("algorithm", b_init="kaiming_uniform", density=1.0, cuts=None)),
    ({"algorithm": "drtp"}, _keys("algorithm", b_init="kaiming_uniform", scale=1.0, error_sign=False, density=1.0, cuts=None)),
    # Images keep their stored size, 28x28, 32x32 or 64x64; ImageNet is cropped to 224x224 and has the usual normalisation.
    (
        {"dataset": ("mnist", "fashion_mnist", "svhn", "cifar10", "cifar100", "tiny_imagenet")},
        _keys("dataset", crop="padded", size=None, validation_seed=0),
    ),
    ({"dataset": "mnist"}, _keys("dataset", mean=[0.1307], std=[0.3081], augment=False)),
    (
        {"dataset": "imagenet"},
        _keys(
            "dataset",
            mean=[0.485, 0.456, 0.406],
            std=[0.229, 0.224, 0.225],
            augment=True,
            crop="resized",
            size=224,
            validation_seed=0,
        ),
    ),
    # Unless an experiment's own settings differ, the optimizer is SGD with momentum 0.9, for W and for learned feedback.
    ({}, {"feedback_optimizer": None, "optimizer": "sgd", "optimizer.first_epoch_weight_decay": None}),
    ({"optimizer": "sgd"}, _keys("optimizer", momentum=0.9, nesterov=False)),
    ({"optimizer": "adam"}, _keys("optimizer", **ADAM)),
]

# --- Woo et al. 2021 (ASAP) -----------------------------------------------------------------------------------------------------

#: The settings are from appendix C. Incomplete batches are kept, as in the data loader of the code [code]; there is no validation
#: split [code].
ASAP: Settings = {
    "epochs": 200,
    "batch_size": 128,
    "drop_last": False,
    "dataset.validation": 0.0,
    "optimizer.weight_decay": 5e-4,
    **COSINE,
}
ASAP_CASES: list[Case] = [
    # The paper's "Kaiming" is torch's default for convolutions, U(±1/√fan_in) [code]. In the code, the nets for FA, DFA and ASAP
    # sample fully connected weights from U(±√(6/fan_in)) and set their biases to zero; the nets for BP use torch's default
    # [code]. Here, all rules start with the same weights, so that they can be compared [choice].
    ({}, {"architecture.init": "pytorch", "architecture.linear_init": "kaiming_uniform"}),
    # Appendix C uses crops and flips on CIFAR and Tiny ImageNet. Means and standard deviations are from the code [code], which
    # uses those of CIFAR-10 for CIFAR-100, too. Those of Tiny ImageNet are from a derivative of the code.
    ({}, {"dataset.augment": True}),
    ({"dataset": ("cifar10", "cifar100")}, _keys("dataset", mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])),
    ({"dataset": "tiny_imagenet"}, _keys("dataset", mean=[0.480, 0.448, 0.398], std=[0.277, 0.269, 0.282])),
    ({"dataset": "svhn"}, _keys("dataset", mean=[0.5], std=[0.5], augment=False)),
    ({"dataset": "mnist"}, {"dataset.augment": False}),
    # The feedback of DFA is N(0, 1/classes) [code]. The feedback of FA is sampled like torch's default weights in convolutions,
    # and from U(-1, 1) in fully connected layers [code]. The code for KP is not public, so its feedback is sampled like the
    # weights in all layers [choice]. B and W are initially independent [choice].
    ({"algorithm": "dfa"}, {"algorithm.b_init": "normal_fan_out"}),
    ({"algorithm": "fa"}, _keys("algorithm", b_init="pytorch", linear_b_init="uniform_one")),
    ({"algorithm": "kp"}, _keys("algorithm", b_init="pytorch", linear_b_init="kaiming_uniform")),
    # Learning rates are from Table 3. The baseline `frozen` has the learning rate of BP, and the variants of ASAP have that of
    # ASAP [choice].
    ({"algorithm": ("bp", "frozen", "kp")}, {"optimizer.lr": 3e-2}),
    ({"algorithm": ("fa", "dfa")}, {"optimizer.lr": 3e-3}),
    ({"algorithm": ASAP_RULES}, {"optimizer.lr": 3e-2}),
    ({"algorithm": ASAP_RULES, "dataset": "svhn"}, {"optimizer.lr": 3e-3}),
    ({"algorithm": ASAP_RULES, "architecture.shortcuts": False}, {"optimizer.lr": 3e-3}),
    ({"algorithm": ("fa", "dfa", *ASAP_RULES), "architecture": "asap_alexnet"}, {"optimizer.lr": 1e-4}),
]
ASAP_TABLE1 = ["bp", "frozen", "kp", "fa", "dfa", "asap"]
ASAP_PAPER: dict[str, Preset] = {
    "asap_table1": Preset(
        [
            {
                "dataset": ["mnist", "svhn", "cifar10", "cifar100"],
                "architecture": ["asap_alexnet"],
                "algorithm": ASAP_TABLE1,
                "seed": [0],
            },
            {
                "dataset": ["svhn", "cifar10", "cifar100", "tiny_imagenet"],
                "architecture": ["resnet18"],
                "algorithm": ASAP_TABLE1,
                "seed": [0],
            },
            {
                "dataset": ["cifar10", "cifar100", "tiny_imagenet"],
                "architecture": ["resnet34"],
                "algorithm": ASAP_TABLE1,
                "seed": [0],
            },
            {
                "dataset": ["svhn", "cifar10", "cifar100"],
                "architecture": ["resnet18"],
                "architecture.shortcuts": [False],
                "algorithm": ASAP_TABLE1,
                "seed": [0],
            },
        ],
        ASAP,
        ASAP_CASES,
    ),
    "asap_table2": Preset(
        [{"architecture": ["resnet18", "resnet34"], "algorithm": ["bp", "frozen", "asap", "asfp", "asfp_lc"], "seed": [0]}],
        ASAP | {"dataset": "cifar10"},
        ASAP_CASES,
    ),
    # The paper does not name the net of Table 4. Its accuracies are those of ResNet-34 in Table 5.
    "asap_table4": Preset(
        [
            {"algorithm": ["bp", "asap"], "optimizer.weight_decay": [0.0, 5e-6, 5e-5, 5e-4, 5e-3], "seed": [0]},
            {"algorithm": ["frozen"], "seed": [0]},
        ],
        ASAP | {"dataset": "cifar10", "architecture": "resnet34"},
        ASAP_CASES,
    ),
    # Local learning uses Adam with a learning rate of 5e-3 [paper], without decay [code].
    "asap_table5": Preset(
        [
            {"architecture": ["resnet18", "resnet34"], "algorithm": ["bp", "frozen", "asap"], "seed": [0]},
            {
                "architecture": ["resnet18", "resnet34"],
                "algorithm": ["local_error", "predsim", "dgl"],
                "optimizer": ["adam"],
                "seed": [0],
            },
        ],
        ASAP | {"dataset": "cifar10"},
        [*ASAP_CASES, ({"optimizer": "adam"}, {"optimizer.lr": 5e-3, "optimizer.weight_decay": 0.0})],
    ),
    # The comparison is from appendix D.2; the dataset is the project's choice [choice].
    "asap_fig9": Preset(
        [
            {"algorithm": ["bp", "frozen"], "seed": [0]},
            {"algorithm": ["asap"], "algorithm.match": ["max_pool", "avg_pool", "random"], "seed": [0]},
        ],
        ASAP | {"dataset": "cifar10", "architecture": "asap_alexnet"},
        ASAP_CASES,
    ),
    # Appendix A.2 uses a batch size of 50 and a learning rate of 1e-4. It trains a linear net, and a net with normalisation and
    # ReLU, both with 10-10-10 neurons. The net with normalisation also normalises its logits [code]. Hidden widths of 10-10-10
    # after 784 inputs, and three seeds, are the project's choice [choice].
    "asap_fig6": Preset(
        [
            {
                "algorithm": ["bp", "forward_alignment"],
                "architecture.activation": ["identity"],
                "architecture.init": ["kaiming_uniform"],
                "seed": [0, 1, 2],
            },
            {
                "algorithm": ["bp", "forward_alignment"],
                "architecture.batch_norm": [True],
                "architecture.output_norm": [True],
                "seed": [0, 1, 2],
            },
        ],
        ASAP | {"dataset": "mnist", "architecture": "mlp"},
        [
            *ASAP_CASES,
            # Each net has the initialiser with which backpropagation is closer to its published accuracy [choice].
            ({}, {"batch_size": 50, "optimizer.lr": 1e-4, "architecture.widths": [10, 10, 10], "architecture.linear_init": None}),
            ({"algorithm": "forward_alignment"}, {"algorithm.c_init": "kaiming_uniform"}),
        ],
    ),
}

# --- Li and Benna 2024 (PFA) ----------------------------------------------------------------------------------------------------

#: Appendix A initialises weights and feedback with Glorot's method; incomplete batches are dropped [code].
PFA: Settings = {"architecture.init": "xavier_uniform", "drop_last": True}
PFA_CASES: list[Case] = [({"algorithm": ("fa", "dfa")}, {"algorithm.b_init": "xavier_uniform"})]
BOTH_PFA = ("pfa", "pfa_o")
PFA_TABLE = ["bp", "frozen", "fa", "dfa", "usf", "pfa", "pfa_o"]
FIVE = range(5)
#: The settings are from appendix A.1. Curves are measured on the test set [code], so there is no validation split.
PFA_MNIST: Settings = PFA | {
    "dataset": "mnist",
    "architecture": "mlp",
    "epochs": 40,
    "batch_size": 64,
    "dataset.validation": 0.0,
    "optimizer.lr": 1e-2,
    "optimizer.weight_decay": 1e-4,
    **_multistep([20, 30], 0.5),
}
#: For PFA and PFA-o, the decay after the first epoch is 0.003 x 0.03 = 9e-5 [code], but the paper states 1e-4.
PFA_MNIST_CASES: list[Case] = [
    *PFA_CASES,
    ({"algorithm": BOTH_PFA}, {"optimizer.first_epoch_weight_decay": 0.03, "optimizer.weight_decay": 9e-5}),
]
PFA_PAPER: dict[str, Preset] = {
    "pfa_fig2": Preset([{"algorithm": PFA_TABLE, "seed": FIVE}], PFA_MNIST, PFA_MNIST_CASES),
    "pfa_fig6": Preset(
        [
            {"algorithm": ["bp"], "seed": FIVE},
            {"algorithm": ["fa", "dfa", "usf", "pfa"], "algorithm.density": [1.0, 0.5, 0.3, 0.17, 0.1, 0.05], "seed": FIVE},
        ],
        PFA_MNIST,
        PFA_MNIST_CASES,
    ),
    # The settings are from appendix A.2. The code trains for 250 epochs and holds out 5,000 images with seed 0 [code]. The
    # paper states 200 epochs, but then the last milestone, 200, would have no effect. DFA's kernels, the means and the standard
    # deviations are from the released code [code].
    "pfa_fig4": Preset(
        [{"algorithm": PFA_TABLE, "seed": FIVE}],
        PFA
        | {
            "dataset": "cifar10",
            "architecture": "resnet20",
            "epochs": 250,
            "batch_size": 128,
            "dataset.validation": 5000,
            "dataset.augment": True,
            "dataset.mean": [0.4914, 0.4821, 0.4465],
            "dataset.std": [0.2470, 0.2435, 0.2616],
            "optimizer.lr": 0.1,
            "optimizer.weight_decay": 1e-4,
            **_multistep([100, 150, 200], 0.1),
        },
        [
            *PFA_CASES,
            ({"algorithm": "dfa"}, {"optimizer.lr": 1e-3, "algorithm.form": "kernel"}),
            ({"algorithm": BOTH_PFA}, {"optimizer.first_epoch_weight_decay": 0.005}),
        ],
    ),
    # The settings are from appendix A.3, with one seed.
    "pfa_fig5": Preset(
        [{"algorithm": ["bp", "frozen", "usf", "pfa", "pfa_o"], "seed": [0]}],
        PFA
        | {
            "dataset": "imagenet",
            "architecture": "resnet18_imagenet",
            "epochs": 75,
            "batch_size": 256,
            "dataset.validation": 0.0,
            "optimizer.lr": 0.1,
            "optimizer.weight_decay": 1e-4,
            **_multistep([20, 40, 60], 0.1),
        },
        [*PFA_CASES, ({"algorithm": BOTH_PFA}, {"optimizer.first_epoch_weight_decay": 5e-4})],
    ),
}

# --- "Learning the connections in direct feedback alignment" (DKP) --------------------------------------------------------------

#: Section 3.1 uses SGD with a Nesterov momentum of 0.9 and a constant learning rate. There is no validation split, incomplete
#: batches are kept, and the initial weights are torch's default [code].
DKP: Settings = {
    "architecture.init": "pytorch",
    "drop_last": False,
    "dataset.validation": 0.0,
    "optimizer.nesterov": True,
    **CONSTANT,
}
DKP_CASES: list[Case] = [
    # Section 3.1 uses Kaiming's initialisation for the feedback of DFA and DKP. The section does not mention KP and FA. The
    # feedback of KP is sampled like the weights, and that of FA with Glorot's method [choice]. The paper does not give the
    # learning rates of FA, KP and DRTP; they are those of DKP [choice].
    ({"algorithm": "dfa"}, {"algorithm.b_init": "kaiming_uniform"}),
    ({"algorithm": "kp"}, {"algorithm.b_init": "pytorch"}),
    ({"algorithm": "fa"}, {"algorithm.b_init": "xavier_uniform"}),
]
#: For the net with two convolutions, section 3.1 uses a learning rate of 1e-2 for W. The learning rate of B starts at 1e-4 and is
#: multiplied by 0.85 after each epoch. The decay of W and B is 1e-6.
DKP_SMALL: Settings = DKP | {"optimizer.lr": 1e-2, "optimizer.weight_decay": 1e-6}
DKP_SMALL_CASES: list[Case] = [
    *DKP_CASES,
    (
        {"algorithm": "dkp"},
        {"feedback_optimizer": "sgd"}
        | _keys(
            "feedback_optimizer",
            lr=1e-4,
            weight_decay=1e-6,
            first_epoch_weight_decay=None,
            momentum=0.9,
            nesterov=True,
            **{"schedule.name": "step", "schedule.step_size": 1, "schedule.gamma": 0.85},
        ),
    ),
]
#: In AlexNet, Adam trains B with a constant learning rate of 5e-4 and the decay of W.
DKP_LARGE_CASES: list[Case] = [
    *DKP_CASES,
    (
        {"algorithm": "dkp"},
        {"feedback_optimizer": "adam"}
        | _keys(
            "feedback_optimizer",
            lr=5e-4,
            weight_decay=1e-4,
            first_epoch_weight_decay=None,
            **ADAM,
            **{"schedule.name": "constant"},
        ),
    ),
]
DKP_TABLE = ["bp_fc", "bp", "frozen", "kp", "fa", "drtp", "dfa", "dkp"]
TEN = range(10)
DKP_PAPER: dict[str, Preset] = {
    # The 50 epochs and ten trials are from the paper [paper]; the batch size, normalisation and lack of augmentation are from the
    # code [code].
    "dkp_table1": Preset(
        [{"dataset": ["fashion_mnist", "cifar10"], "algorithm": DKP_TABLE, "seed": TEN}],
        DKP_SMALL
        | {
            "architecture": "conv2",
            "epochs": 50,
            "batch_size": 64,
            "dataset.augment": False,
            "dataset.mean": [0.5],
            "dataset.std": [0.5],
        },
        DKP_SMALL_CASES,
    ),
    # The 90 epochs, ten trials and decay 1e-4 are from the paper [paper]; the batch size, crops and normalisation are from the
    # code [code]. Section 3.2 uses a learning rate of 0.1 for backpropagation, both in all layers and in the fully connected
    # layers only. The learning rate of DFA and DKP is 0.01 on CIFAR-100 and 5e-3 on Tiny ImageNet. The baseline `frozen` trains
    # only the output layer, with the learning rate of DKP [choice].
    "dkp_table2": Preset(
        [{"dataset": ["cifar100", "tiny_imagenet"], "algorithm": DKP_TABLE, "seed": TEN}],
        DKP
        | {
            "architecture": "dkp_alexnet",
            "epochs": 90,
            "batch_size": 256,
            "optimizer.weight_decay": 1e-4,
            **_keys("dataset", augment=True, crop="resized", size=224, mean=[0.5], std=[0.5]),
        },
        [
            *DKP_LARGE_CASES,
            ({"dataset": "cifar100"}, {"optimizer.lr": 1e-2}),
            ({"dataset": "tiny_imagenet"}, {"optimizer.lr": 5e-3}),
            ({"algorithm": ("bp", "bp_fc")}, {"optimizer.lr": 0.1}),
        ],
    ),
    # The net has five layers with normalisation and is trained on MNIST. With batches of 50, 15 epochs amount to the 18,000
    # iterations of the figure. Widths, batch size, learning rates and the three seeds are the project's choice [choice].
    "dkp_fig2": Preset(
        [{"algorithm": ["bp", "frozen", "dfa", "dkp"], "seed": [0, 1, 2]}],
        DKP_SMALL
        | {
            "dataset": "mnist",
            "architecture": "mlp",
            "architecture.widths": [512] * 4,
            "architecture.batch_norm": True,
            "epochs": 15,
            "batch_size": 50,
        },
        DKP_SMALL_CASES,
    ),
}

# --- Akrout et al. 2019 (weight mirrors) ----------------------------------------------------------------------------------------

#: Section 6 trains on ImageNet with normalisation after the ReLU, and reduces the learning rate by 90 % at epoch 32. All other
#: settings are in an appendix that is not available. Learning rate, momentum, decay, batch size and initial weights are those of
#: torchvision's reference, and there are 50 epochs [choice]. torchvision uses kaiming_normal_fan_out only for convolutions; its
#: output layer has torch's default.
WM: Settings = {
    "dataset": "imagenet",
    "dataset.validation": 0.0,
    "epochs": 50,
    "batch_size": 256,
    "drop_last": True,
    "optimizer.lr": 0.1,
    "optimizer.weight_decay": 1e-4,
    "architecture.bn": "after",
    "architecture.init": "kaiming_normal_fan_out",
    "architecture.linear_init": "pytorch",
    **_multistep([32], 0.1),
}
WM_CASES: list[Case] = [
    # In all layers, the feedback is sampled like the weights of convolutions [choice].
    ({"algorithm": ("fa", "kp", "wm")}, {"algorithm.b_init": "kaiming_normal_fan_out"}),
    # In section 6, noise passes through the ReLU, and biases are not blocked. As in the authors' numpy code, there is one mirror
    # step per training step, and a whole epoch of 1,281,167 // 256 mirror steps before training. The mirror's learning rate and
    # the unit noise are the project's choice [choice].
    (
        {"algorithm": "wm"},
        _keys(
            "algorithm",
            activation="relu",
            block_bias=False,
            mirror_batch=256,
            initial_steps=1_281_167 // 256,
            mirror_steps=1,
            mirror_rate=0.01,
            noise="gaussian",
            sigma=1.0,
            per_tap=True,
        ),
    ),
    # USF has the scale of Xiao et al. 2018, and uses the output layer's true weight [code].
    ({"algorithm": "usf"}, _keys("algorithm", scale="xiao", plain_last=True)),
]
WM_NETS = ["resnet18_imagenet", "resnet50_imagenet"]
WM_PAPER: dict[str, Preset] = {
    "wm_fig3": Preset(
        [
            {"architecture": WM_NETS, "algorithm": ["bp", "frozen", "fa", "usf", "kp", "wm"], "seed": [0]},
            {"architecture": WM_NETS, "algorithm": ["usf"], "architecture.bn": ["before"], "seed": [0]},
        ],
        WM,
        WM_CASES,
    ),
    "wm_fig4": Preset([{"algorithm": ["wm", "kp", "usf"], "seed": [0]}], WM | {"architecture": "resnet50_imagenet"}, WM_CASES),
}

#: The project's introductory sweep, which is not from a paper. The sweep uses the digits dataset, which needs no download.
QUICKSTART = Preset(
    [{"algorithm": ["bp", "frozen", "fa", "usf", "dfa", "kp"], "seed": [0, 1, 2]}],
    {
        "dataset": "digits",
        "dataset.validation": 0.1,
        "dataset.validation_seed": 0,
        "dataset.mean": [0.5],
        "dataset.std": [0.5],
        "architecture": "mlp",
        "architecture.init": "pytorch",
        "epochs": 30,
        "batch_size": 64,
        "drop_last": True,
        "threads": 1,
        "optimizer.lr": 0.05,
        "optimizer.weight_decay": 1e-3,
        **CONSTANT,
    },
    [({"algorithm": ("fa", "dfa", "kp")}, {"algorithm.b_init": "xavier_uniform"})],
)

#: The configs, before tuning, of a study of five rules. fa-bench-tune chooses their learning rates and weight decays.
TUNE_DIGITS = Preset(
    [{"algorithm": ["bp", "frozen", "fa", "kp", "dfa"], "seed": [0, 1, 2]}],
    QUICKSTART.common | {"epochs": 10, "probe_every": 0, "optimizer.weight_decay": 0.0},
    QUICKSTART.cases,
)

#: The configs, before tuning, of a study of every rule. Rules that share activations share them in fully connected layers, too.
COMPARE = Preset(
    [{"algorithm": ["bp", "frozen", *sorted(set(ALGORITHMS) - {"bp", "frozen"})], "seed": [0, 1, 2]}],
    QUICKSTART.common | {"epochs": 20, "probe_every": 0, "optimizer.weight_decay": 0.0},
    [*QUICKSTART.cases, ({"algorithm": ("asap", "asfp", "asfp_lc")}, {"algorithm.linear": "share"})],
)

#: The faeval protocol as of spring 2026. The optimizer, learning rate, decay, schedule, batch size, epochs, seeds, widths and
#: depths are from the history of the protocol's repository, not from a paper. Validation, augmentation, normalisation and the
#: variants of dfa are our choice [choice].
FAEVAL_NETS, FAEVAL_SEEDS = ["residual_mlp", "vit_mini"], [42, 123, 456]
FAEVAL = Preset(
    [
        {"architecture": FAEVAL_NETS, "algorithm": ["bp", "frozen", "frozen_blocks", "fa"], "seed": FAEVAL_SEEDS},
        {
            "architecture": FAEVAL_NETS,
            "algorithm": ["dfa"],
            "algorithm.within": ["layer", "block"],
            "algorithm.positions": ["own"],
            "seed": FAEVAL_SEEDS,
        },
        {
            "architecture": ["vit_mini"],
            "algorithm": ["dfa"],
            "algorithm.within": ["layer", "block"],
            "algorithm.positions": ["shared"],
            "seed": FAEVAL_SEEDS,
        },
    ],
    {
        "dataset": "cifar10",
        **_keys("dataset", validation=0.0, augment=False, mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616]),
        "optimizer": "adamw",
        **_keys("optimizer", lr=1e-3, weight_decay=0.01, **ADAM),
        **COSINE,
        "epochs": 30,
        "batch_size": 128,
        "probes": ["stream_growth", "stability", "effective_rank"],
    },
    [
        ({"algorithm": ("fa", "dfa")}, {"algorithm.b_init": "xavier_uniform"}),
        (
            {"architecture": "residual_mlp"},
            _keys("architecture", width=256, blocks=4, expansion=4.0, activation="gelu", final_norm=True),
        ),
        ({"architecture": "vit_mini"}, _keys("architecture", width=128, blocks=4, patch=4)),
    ],
)

#: A small decoder is trained on the built-in text; this experiment is not from a paper. dfa is run with one cut at the end of
#: each block ("macro" in Launay et al. 2020) and with three cuts per block ("micro"). As in their paper, all cuts share one
#: matrix. The error is taken before the vocabulary layer.
LM_SEEDS, LM_CUTS = [0, 1, 2], [None, ["layers.*.norm1", "layers.*.act", "layers.*.norm2"]]
LM_QUICKSTART = Preset(
    [
        {"algorithm": ["bp", "frozen_blocks", "fa", "kp"], "seed": LM_SEEDS},
        {
            "algorithm": ["dfa"],
            "algorithm.form": ["shared"],
            "algorithm.within": ["block"],
            "algorithm.error_at": ["layers"],
            "algorithm.cuts": LM_CUTS,
            "seed": LM_SEEDS,
        },
    ],
    {
        "dataset": "text",
        "objective": "token_cross_entropy",
        "objective.score": "bits_per_character",
        "architecture": "decoder",
        **_keys("architecture", depth=2, width=64, norm="post", dropout=0.0),
        "optimizer": "adam",
        **_keys("optimizer", lr=3e-3, **ADAM),
        **CONSTANT,
        "epochs": 5,
        "batch_size": 32,
        "threads": 1,
    },
    [({"algorithm": ("fa", "dfa", "kp")}, {"algorithm.b_init": "xavier_uniform"})],
)

#: The settings are those of Mono-Forward in the independent implementation BeyondBackpropagation. The widths, the learning rates
#: on MNIST and CIFAR-10, the number of epochs per layer, the batch size, the validation split, and torch's initial weights are
#: from the code [code]. Training all layers at once, the learning rates on the other two datasets, and the use of the rates for
#: all rules are our choice [choice].
MONO_FORWARD = Preset(
    [
        {
            "dataset": ["mnist", "fashion_mnist", "cifar10", "cifar100"],
            "algorithm": ["bp", "frozen", "bp_deepsup", "predsim"],
            "seed": [0, 1, 2],
        }
    ],
    {
        "architecture": "mlp",
        "architecture.init": "pytorch",
        "optimizer": "adam",
        **_keys("optimizer", weight_decay=0.0, **ADAM),
        **CONSTANT,
        "batch_size": 128,
        "dataset.validation": 0.1,
        "dataset.augment": False,
    },
    [
        ({"dataset": ("mnist", "fashion_mnist")}, {"architecture.widths": [1000, 1000], "optimizer.lr": 1.5703e-3, "epochs": 14}),
        ({"dataset": ("cifar10", "cifar100")}, {"architecture.widths": [2000] * 3, "optimizer.lr": 3.2418e-4, "epochs": 15}),
        ({"algorithm": "predsim"}, _keys("algorithm", loss="pred", decoder_init="pytorch", decoder_bias=False)),
    ],
)

#: The experiment follows Høier et al. 2023. Epochs, batch size, learning rate, length of the warm-up, momentum, decay and the
#: number of seeds are from the code [code]; beta is the value in the code, 1, divided by the batch size. The schedule of the
#: learning rate, the initial B, augmentation and the lack of a validation split are our choice [choice].
DUAL_SEEDS = [0, 1, 2, 3, 4]
DUAL_PROPAGATION = Preset(
    [
        {"algorithm": ["bp", "frozen", "dual_propagation"], "seed": DUAL_SEEDS},
        {"algorithm": ["kp"], "algorithm.derivative": ["exact", "dual"], "seed": DUAL_SEEDS},
    ],
    {
        "dataset": "cifar10",
        **_keys("dataset", validation=0.0, augment=True, mean=[0.4914, 0.4822, 0.4465], std=[0.247, 0.2435, 0.2616]),
        "architecture": "vgg",
        "architecture.depth": 16,
        "epochs": 130,
        "batch_size": 100,
        "optimizer": "sgd",
        **_keys("optimizer", lr=0.025, momentum=0.9, weight_decay=5e-4),
        **COSINE,
        "optimizer.schedule.warmup": 10,
    },
    [
        ({"algorithm": "dual_propagation"}, _keys("algorithm", derivative="dual", beta=0.01)),
        ({"algorithm": "kp"}, {"algorithm.b_init": "lecun_uniform", "optimizer.schedule.warmup": 15}),
    ],
)

#: The settings are those of forward-forward in the independent implementation loeweX/Forward-Forward [code]. The range of the
#: images, the seeds, and the initial weights, learning rate and decay of bp and frozen are our choice [choice].
FORWARD_FORWARD = Preset(
    [{"algorithm": ["forward_forward", "bp", "frozen"], "seed": [0, 1, 2]}],
    {
        "dataset": "mnist",
        **_keys("dataset", validation=10000, mean=[0.0], std=[1.0]),
        "architecture": "mlp",
        "architecture.widths": [1000] * 3,
        "architecture.init": "pytorch",
        "epochs": 100,
        "batch_size": 100,
        "drop_last": True,
        **_keys("optimizer", lr=0.05, momentum=0.9, weight_decay=0.0),
        **_keys("optimizer.schedule", name="linear", min_lr=0.0, flat=0.5),
    },
    [
        (
            {"algorithm": "forward_forward"},
            {
                "architecture.init": "normal_fan_out",
                "architecture.output_init": "zeros",
                **_keys("optimizer", lr=1e-3, weight_decay=3e-4),
                "feedback_optimizer": "sgd",
                **_keys(
                    "feedback_optimizer",
                    lr=0.01,
                    momentum=0.9,
                    weight_decay=3e-3,
                    first_epoch_weight_decay=None,
                    nesterov=False,
                    **_keys("schedule", name="linear", min_lr=0.0, flat=0.5),
                ),
                **_keys(
                    "algorithm",
                    theta=None,
                    peer_norm=0.03,
                    full_gradient=True,
                    label_scale=1.0,
                    all_layers=True,
                    prediction="classifier",
                    cuts=None,
                ),
            },
        ),
    ],
)

#: The settings are those of deep feedback control in the repository mariacer/strong_dfc. They are from the repository's commands
#: for MNIST and from the defaults of its code [code]. The eps of dfc is half of the code's, because the code's gradient has a
#: factor of 2 that ours lacks. The following are our choice: the steady state in closed form, no pretraining of the feedback, the
#: clipping of all gradients of bp and frozen by one norm, the settings of bp for frozen, and three seeds [choice].
DFC = Preset(
    [{"algorithm": ["dfc", "bp", "frozen"], "seed": [0, 1, 2]}],
    {
        "dataset": "mnist",
        "dataset.validation": 5000,
        "architecture": "mlp",
        **_keys("architecture", widths=[256, 256, 256], activation="tanh", init="xavier_normal"),
        "epochs": 40,
        "batch_size": 128,
        "clip_norm": 1.0,
        "optimizer": "adam",
        **_keys("optimizer", lr=0.002, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=0.002),
        **CONSTANT,
    },
    [
        (
            {"algorithm": "dfc"},
            {
                "batch_size": 32,
                "clip_norm": None,
                **_keys("optimizer", lr=0.0010924329072635147, beta2=0.99, eps=5.83238643406511e-07 / 2),
                "feedback_optimizer": "adam",
                **_keys(
                    "feedback_optimizer",
                    lr=4.348352883654314e-05,
                    weight_decay=0.1,
                    beta1=0.99,
                    beta2=0.99,
                    eps=3.355535527361205e-05,
                    **_keys("schedule", name="constant"),
                ),
                **_keys(
                    "algorithm",
                    alpha=0.0017723664900917734,
                    target_stepsize=0.013812748252649061,
                    learning_rule="nonlinear_difference",
                    feedback_weights="learned",
                    b_init="xavier_normal",
                    sigma=0.035483751742735006,
                    alpha_fb=0.39857902933813705,
                ),
            },
        ),
    ],
)

#: Rules from outside the four papers are compared with bp, fa, dfa, kp and frozen. The protocol is that of the PFA paper's MNIST
#: runs, but with half as many epochs, a validation split, and the same five learning rates for all rules [choice].
BEYOND = [
    "bp",
    "frozen",
    "fa",
    "dfa",
    "kp",
    "ldfa",
    "symmetric_alignment",
    "activation_alignment",
    "regularized_mirror",
    "information_alignment",
    "bp_deepsup",
    "fdfa",
    "grape",
    "forward_gradient",
    "node_perturbation",
    "weight_perturbation",
    "np_feedback",
    "pepita",
    "forward_forward",
    "dual_propagation",
    "ddtp_linear",
    "ldrl",
    "epc",
    "pc",
    "f3",
]
BEYOND_MNIST = Preset(
    [{"algorithm": BEYOND, "optimizer.lr": [1e-4, 1e-3, 1e-2, 3e-2, 1e-1], "seed": [0, 1, 2]}],
    PFA_MNIST | {"epochs": 20, "dataset.validation": 0.1, **_multistep([10, 15], 0.5)},
    PFA_MNIST_CASES,
)

PRESETS: dict[str, Preset] = {
    **ASAP_PAPER,
    **PFA_PAPER,
    **DKP_PAPER,
    **WM_PAPER,
    "quickstart": QUICKSTART,
    "tune_digits": TUNE_DIGITS,
    "compare": COMPARE,
    "faeval": FAEVAL,
    "lm_quickstart": LM_QUICKSTART,
    "mono_forward": MONO_FORWARD,
    "forward_forward": FORWARD_FORWARD,
    "dual_propagation": DUAL_PROPAGATION,
    "dfc": DFC,
    "beyond_mnist": BEYOND_MNIST,
}
