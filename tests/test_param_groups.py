"""Parameter groups: the linear layers in repeated blocks, and nothing else, are monitored.

For every model class below the number and the kinds of its units are known exactly, `unit_of`
accepts every one of them, and every trainable tensor is in exactly one group, whatever the model is
wrapped in. All models are built from tiny configurations, without weights from anywhere.
"""

import copy
import functools
import math
import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from grades_kernels import GradESAdamW, grades_param_groups
from grades_kernels.freezing import naming, param_groups
from grades_kernels.freezing.naming import layer_and_kind, unit_of


def monitored(groups):
    """Unit -> names of its tensors, from the groups alone, as the optimizer finds them."""
    found = {}
    for group in groups:
        if group["tau"] is not None:
            for name, tensor in group["params"]:
                unit = unit_of(name, tensor.shape, tensor.dtype)
                found.setdefault(unit, []).append(name)
    return found


def assert_sound(model, groups):
    """Every trainable tensor once, accepted by `unit_of`; vectors without decay."""
    pairs = [pair for group in groups for pair in group["params"]]
    assert dict(pairs).keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len({tensor for _, tensor in pairs}) == len(pairs)
    assert None not in monitored(groups), "a monitored tensor that unit_of does not accept"
    for group in groups:
        assert group["params"], "an empty group"
        for name, tensor in group["params"]:
            is_vector = tensor.dim() < 2 or sum(size > 1 for size in tensor.shape) == 0
            if is_vector or "norm" in name.lower() or name.endswith("bias"):
                assert group["weight_decay"] == 0, name


def kinds(groups):
    """Kind -> number of units."""
    return dict(Counter(layer_and_kind(unit)[1] for unit in monitored(groups)))


def per_layer(names, *, layers=2, prefix=""):
    return dict.fromkeys((prefix + name for name in names.split()), layers)


def settings(text):
    """A dictionary of integers, written as "a=1 b=2"."""
    return {key: int(value) for key, value in (item.split("=") for item in text.split())}


WORDS = settings("vocab_size=32 pad_token_id=0 bos_token_id=1 eos_token_id=2")
SIZES = settings("hidden_size=16 num_hidden_layers=2")
HEADS = SIZES | settings("num_attention_heads=2")
SMALL_LM = SIZES | settings("vocab_size=32")
MHA_LM = WORDS | HEADS | settings("intermediate_size=24 max_position_embeddings=32")
LM = MHA_LM | settings("num_key_value_heads=1")
ONE_LAYER = LM | {"num_hidden_layers": 1, "tie_word_embeddings": True}
HEAD_DIM = settings("head_dim=8")
GPT2 = settings("vocab_size=32 n_embd=16 n_layer=2 n_head=2 n_positions=32")
OPT = SMALL_LM | HEADS | settings("ffn_dim=24 max_position_embeddings=32 word_embed_proj_dim=8")
VISION = HEADS | settings("intermediate_size=24 image_size=8 patch_size=4")
PROJECTION = settings("projection_dim=16")
CLIP = {"text_config": MHA_LM | PROJECTION, "vision_config": VISION | PROJECTION, **PROJECTION}
T5 = settings("vocab_size=32 d_model=16 d_kv=8 d_ff=24 num_layers=2 num_heads=2")
MOE = LM | settings("moe_intermediate_size=8 num_experts_per_tok=2")
MIXTRAL = LM | settings("num_local_experts=4")
QWEN2_MOE = MOE | settings("num_experts=4 shared_expert_intermediate_size=16")
GPT_OSS = LM | settings("head_dim=8 num_local_experts=4 num_experts_per_tok=2")
DEEPSEEK = MOE | settings("""
    num_key_value_heads=2 n_routed_experts=4 n_group=2 topk_group=1 first_k_dense_replace=1
    q_lora_rank=8 kv_lora_rank=8 qk_rope_head_dim=4 qk_nope_head_dim=4 v_head_dim=8
""")

ATTENTION = per_layer("q_proj k_proj v_proj o_proj")
GATED_MLP = "gate_proj up_proj down_proj"
LLAMA = ATTENTION | per_layer(GATED_MLP)
BERT = per_layer("query key value", prefix="attention.self.") | per_layer(
    "attention.output.dense intermediate.dense output.dense"
)
EXPERTS = per_layer("experts.gate_up_proj experts.down_proj")
MOE_UNITS = ATTENTION | EXPERTS
OUT_PROJ_BLOCK = "q_proj k_proj v_proj self_attn.out_proj fc1 fc2"
T5_ATTENTION = " ".join(f"SelfAttention.{p}" for p in "qkvo")
T5_CROSS = " ".join(f"EncDecAttention.{p}" for p in "qkvo")


def t5_units(mlp, layers):
    mlp = " ".join(f"DenseReluDense.{name}" for name in mlp.split())
    return per_layer(f"{T5_ATTENTION} {mlp}", layers=layers) | per_layer(
        f"{T5_ATTENTION} {T5_CROSS} {mlp}", layers=layers, prefix="decoder."
    )


PHI3 = per_layer("qkv_proj o_proj gate_up_proj down_proj")
CONV1D = per_layer("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj")
NEOX = per_layer("query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h")
TWO_TOWERS = per_layer(OUT_PROJ_BLOCK) | per_layer(OUT_PROJ_BLOCK, prefix="vision.")
SHARED_EXPERT = per_layer(GATED_MLP, prefix="shared_expert.")
DEEPSEEK_UNITS = (
    per_layer("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj")
    | per_layer(GATED_MLP, layers=1)
    | dict.fromkeys(EXPERTS, 1)
    | per_layer(GATED_MLP, layers=1, prefix="shared_experts.")
)
MAMBA = per_layer("in_proj x_proj dt_proj out_proj", prefix="mixer.")
RWKV = per_layer("key value receptance output", prefix="attention.") | per_layer(
    "key value receptance", prefix="feed_forward."
)

# id: model class, settings of its configuration, kinds of units with their numbers
TRANSFORMERS = {
    "llama": ("LlamaForCausalLM", LM, LLAMA),
    "llama-one-layer-tied": ("LlamaForCausalLM", ONE_LAYER, dict.fromkeys(LLAMA, 1)),
    "llama-classification": ("LlamaForSequenceClassification", LM, LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LM | HEAD_DIM, LLAMA),
    "phi3-fused": ("Phi3ForCausalLM", LM, PHI3),
    "gpt2-conv1d": ("GPT2LMHeadModel", GPT2, CONV1D),
    "gpt-neox": ("GPTNeoXForCausalLM", MHA_LM, NEOX),
    "opt-projected": ("OPTForCausalLM", OPT, per_layer(OUT_PROJ_BLOCK, prefix="decoder.")),
    "bert-masked-lm": ("BertForMaskedLM", MHA_LM, BERT),
    "roberta": ("RobertaForSequenceClassification", MHA_LM, BERT),
    "t5-two-stacks": ("T5ForConditionalGeneration", T5, t5_units("wi wo", layers=2)),
    "vit": ("ViTForImageClassification", VISION, ATTENTION | per_layer("fc1 fc2")),
    "clip-two-towers": ("CLIPModel", CLIP, TWO_TOWERS),
    "mixtral-stacked-experts": ("MixtralForCausalLM", MIXTRAL, MOE_UNITS),
    "qwen2-moe-shared-expert": ("Qwen2MoeForCausalLM", QWEN2_MOE, MOE_UNITS | SHARED_EXPERT),
    "gpt-oss-expert-biases": ("GptOssForCausalLM", GPT_OSS, MOE_UNITS),
    "deepseek-v3-dense-then-moe": ("DeepseekV3ForCausalLM", DEEPSEEK, DEEPSEEK_UNITS),
    "mamba": ("MambaForCausalLM", SMALL_LM | settings("state_size=4"), MAMBA),
    "rwkv-mixing-vectors": ("RwkvForCausalLM", SMALL_LM | settings("context_length=16"), RWKV),
}


@pytest.fixture
def hf():
    return pytest.importorskip("transformers")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def checked_groups(model, **options):
    """The groups of a model for tau 0.5, after `assert_sound`."""
    groups = grades_param_groups(model, tau=0.5, **options)
    assert_sound(model, groups)
    return groups


def build(hf, case):
    name, config, _ = TRANSFORMERS[case]
    model_class = getattr(hf, name)
    return model_class(model_class.config_class(**copy.deepcopy(config)))


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_units_of_transformers_models(hf, case):
    """The units are exact, and those of `unit_of` and of the optimizer."""
    model = build(hf, case)
    groups = checked_groups(model, weight_decay=0.1)
    assert kinds(groups) == TRANSFORMERS[case][2]
    expected_units = list(monitored(groups))
    assert set(expected_units) <= dict(model.named_parameters()).keys()
    optimizer = GradESAdamW(groups, tau=0.5, grace_steps=1)
    assert optimizer.monitored_units == expected_units


@pytest.mark.parametrize(
    ("case", "module", "rule", "without"),
    [
        ("gpt2-conv1d", param_groups, "_is_transformers_conv1d", lambda module: False),
        ("mixtral-stacked-experts", param_groups, "_is_linear_weight", lambda m, n, t: t.dim() < 3),
        ("qwen2-moe-shared-expert", naming, "_EXPERT_GATE", re.compile("(?!)")),
        ("opt-projected", param_groups, "_blocks", lambda model: [model]),
        ("clip-two-towers", naming, "_second_stack", lambda stack: ""),
    ],
    ids=["no-conv1d", "no-3d-experts", "routers", "whole-model-as-block", "one-tower"],
)
def test_the_model_classes_notice_a_missing_rule(hf, case, module, rule, without, monkeypatch):
    """Negative control: the case that a rule was made for fails without it."""
    monkeypatch.setattr(module, rule, without)
    with pytest.raises((AssertionError, ValueError)):
        test_units_of_transformers_models(hf, case)


def lora_llama(hf, peft, adapter="default"):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(build(hf, "llama"), config, adapter)


@pytest.mark.parametrize("adapter", ["default", "task-7", "weight"])
def test_lora_pairs_are_the_units(hf, peft, adapter):
    model = lora_llama(hf, peft, adapter)
    groups = checked_groups(model)
    found = monitored(groups)
    assert list(found) == [
        f"model.layers.{layer}.self_attn.{matrix}.lora.{adapter}"
        for layer in (0, 1)
        for matrix in ("q_proj", "v_proj")
    ]
    assert found[f"model.layers.0.self_attn.q_proj.lora.{adapter}"] == [
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.{adapter}.weight"
        for factor in "AB"
    ]
    expected = per_layer("q_proj.lora v_proj.lora")
    assert kinds(groups) == expected
    for params in (groups, model.named_parameters()):
        opt = GradESAdamW(params, tau=0.5, grace_steps=0)
        assert opt.monitored_units == list(found)
        assert {unit.kind for unit in opt.report().units} == expected.keys()


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids=str)
def test_only_the_adapters_that_train_are_monitored(hf, peft, active):
    model = lora_llama(hf, peft)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(active)
    groups = checked_groups(model)
    found = Counter(unit.rpartition(".")[2] for unit in monitored(groups))
    assert found == {name: n for name, n in [("default", 4), ("other", 2)] if name in active}


# Rank 1: the factors have a dimension of 1 and are matrices still.
MIXED = {"r": 1, "target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# id: model, kind and settings of the adapter, kinds of units with their numbers
ADAPTERS = {
    "embedding-head-and-a-module-trained-in-full": (
        ("llama", "LoraConfig", MIXED | {"modules_to_save": ["down_proj"]}),
        per_layer("q_proj.lora down_proj"),
    ),
    "stacked-experts": (
        ("mixtral-stacked-experts", "LoraConfig", {"r": 2, "target_parameters": STACKS}),
        {"experts.lora": 4},
    ),
    "adalora": (
        ("llama", "AdaLoraConfig", {"target_modules": ["q_proj"], "total_step": 10}),
        per_layer("q_proj.lora"),
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_units_of_adapters(hf, peft, case):
    (base, config, options), expected = ADAPTERS[case]
    model = peft.get_peft_model(build(hf, base), getattr(peft, config)(**options))
    groups = checked_groups(model)
    assert kinds(groups) == expected
    if case == "adalora":  # the singular values are the third factor
        assert [len(names) for names in monitored(groups).values()] == [3, 3]


def test_the_error_for_an_adapter_without_lora_factors_names_the_alternative(hf, peft):
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(build(hf, "llama"), config)
    with pytest.raises(ValueError, match=r"hada_w1_a.*14 of the 14 .*named_parameters\(\)"):
        grades_param_groups(model, tau=0.5)


class Block(nn.Module):
    def __init__(self, width=8, *, moe=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 2)
        self.mlp = Moe(width) if moe else nn.Sequential(nn.Linear(width, 12), nn.Linear(12, width))
        self.conv = nn.Conv1d(width, width, 3)


class Moe(nn.Module):
    """Experts as modules, and a router that is a linear layer."""

    def __init__(self, width, n_experts=3):
        super().__init__()
        self.gate = nn.Linear(width, n_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(width, 4)}) for _ in range(n_experts)
        )


class Model(nn.Module):
    """A stem, blocks in a container of the caller's choice, a projector and a head."""

    def __init__(self, blocks, width=8):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.stem = nn.Linear(3, width)
        self.blocks = blocks
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, 10)


class OtherBlock(Block): ...


def linears(*sizes):
    return [nn.Linear(8, size) for size in sizes]


def two_blocks(**settings):
    return in_list(Block(**settings), Block(**settings))


BLOCK = "attn.in_proj_weight attn.out_proj mlp.0 mlp.1"


def in_list(*blocks):
    return Model(nn.ModuleList(blocks))


def in_sequential(*blocks):
    return Model(nn.Sequential(*blocks))


def shallow():
    return nn.Sequential(*linears(8), nn.ReLU())


def head():
    return nn.ModuleDict({"linear": nn.Linear(8, 8), "activation": nn.Tanh()})


def stem():
    return nn.ModuleDict({"conv": nn.Conv1d(8, 8, 3), "norm": nn.BatchNorm1d(8)})


def torch_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TORCH_LAYER = "self_attn.in_proj_weight self_attn.out_proj linear1 linear2"
EXPERT_BLOCKS = {"attn.in_proj_weight": 2, "attn.out_proj": 2, "experts.w1": 6}

# id: a model with blocks (made on demand), kinds of its units with their numbers
CONTAINERS = {
    "list": (lambda: in_list(Block(), Block(), Block()), per_layer(BLOCK, layers=3)),
    "list-of-one": (lambda: in_list(Block()), per_layer(BLOCK, layers=1)),
    "two-classes": (lambda: in_list(Block(), OtherBlock()), per_layer(BLOCK)),
    "linears": (lambda: nn.ModuleDict({"layers": nn.ModuleList(linears(8, 8, 8))}), {"layers": 3}),
    "dict": (lambda: Model(nn.ModuleDict({"0": Block(), "1": Block()})), per_layer(BLOCK)),
    "sequential": (lambda: in_sequential(Block(), Block()), per_layer(BLOCK)),
    "sequential-of-one": (lambda: in_sequential(Block()), per_layer(BLOCK, layers=1)),
    "with-stem-and-head": (
        lambda: in_sequential(*linears(8), Block(), Block(), *linears(8)),
        per_layer(BLOCK),
    ),
    "at-the-root": (lambda: nn.Sequential(Block(), Block()), per_layer(BLOCK)),
    "sequentials": (lambda: nn.Sequential(shallow(), shallow(), *linears(2)), {"0": 2}),
    "shell-is-no-block": (lambda: nn.Sequential(two_blocks()), per_layer(BLOCK)),
    "heads-of-one-class": (lambda: nn.Sequential(two_blocks(), head(), head()), per_layer(BLOCK)),
    "below-a-list-of-linears": (
        lambda: nn.Sequential(
            Block(), Block(), nn.ModuleDict({"parts": nn.ModuleList(linears(2))})
        ),
        per_layer(BLOCK) | {"parts.0": 1},
    ),
    "with-a-convolutional-stem": (
        lambda: nn.Sequential(nn.Sequential(stem(), stem()), Block(), Block()),
        per_layer(BLOCK),
    ),
    "experts-and-linear-router": (lambda: two_blocks(moe=True), EXPERT_BLOCKS),
    "torch-transformer": (torch_layers, per_layer(TORCH_LAYER)),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_units_of_blocks_in_every_container(case):
    make, expected = CONTAINERS[case]
    assert kinds(checked_groups(make())) == expected


@pytest.mark.parametrize("first", ["block", "head"])
def test_a_weight_tied_to_the_head_is_never_monitored(first):
    """`named_parameters` returns one name of a tied tensor; its other names count as well."""
    model = in_list(*linears(10, 10))
    model.head.weight = model.blocks[0].weight
    if first == "head":
        model = nn.ModuleDict({"head": model.head, "blocks": model.blocks})
    groups = checked_groups(model)
    assert list(monitored(groups)) == ["blocks.1.weight"]

    if first == "block":  # negative control: by its first name alone it would be monitored
        model.named_parameters = lambda **kwargs: nn.Module.named_parameters(model)
        assert "blocks.0.weight" in monitored(grades_param_groups(model, tau=0.5))


def test_tensors_without_requires_grad_are_left_out():
    model = two_blocks()
    model.blocks[0].requires_grad_(False)
    model.embed.requires_grad_(False)
    groups = checked_groups(model)
    assert all(unit.startswith("blocks.1.") for unit in monitored(groups))


class Wrapper(nn.Module):
    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


def wrap_in(*names):
    return lambda model: functools.reduce(lambda inner, name: Wrapper(name, inner), names, model)


def every_block(wrap):
    def wrap_blocks(model):
        model.blocks = nn.ModuleList(map(wrap, model.blocks))
        return model

    return wrap_blocks


WRAPPERS = {
    "module": wrap_in("module"),
    "ddp-of-compiled": wrap_in("_orig_mod", "module"),
    "compiled-ddp": wrap_in("module", "_orig_mod"),
    "peft": wrap_in("model", "base_model"),
    "fsdp-root": wrap_in("_fsdp_wrapped_module"),
    "fsdp-blocks": every_block(wrap_in("_fsdp_wrapped_module")),
    "compiled-blocks": every_block(wrap_in("_orig_mod")),
    "checkpointed-blocks": every_block(checkpoint_wrapper),
    "data-parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "torch-compile": torch.compile,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_change_no_unit(wrap):
    model = two_blocks()
    bare = monitored(grades_param_groups(copy.deepcopy(model), tau=0.5))
    wrapped = wrap(model)
    groups = checked_groups(wrapped, taus={r"^blocks\.0\.": 0.25})
    assert list(monitored(groups)) == list(bare)
    assert sum(group["tau"] == 0.25 for group in groups) == 1


def test_groups_have_tau_decay_and_names():
    model = two_blocks()
    groups = grades_param_groups(model, tau=2, weight_decay=0.3)
    by_setting = {(group["tau"], group["weight_decay"]): group for group in groups}
    assert by_setting.keys() == {(2.0, 0.3), (None, 0.3), (None, 0.0)}
    others = "embed stem projector.0 projector.2 head blocks.0.conv blocks.1.conv"
    assert {name for name, _ in by_setting[None, 0.3]["params"]} == {
        f"{module}.weight" for module in others.split()
    }
    optimizer = torch.optim.AdamW(groups)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_scales_shifts_and_biases_in_blocks_are_no_experts_and_do_not_decay():
    model = two_blocks()
    for block in model.blocks:
        for name, *shape in [("scale_shift_table", 1, 6, 8), ("gate", 1, 6, 8), ("bias_u", 2, 4)]:
            setattr(block, name, nn.Parameter(torch.zeros(shape)))
    groups = checked_groups(model, weight_decay=0.1)
    assert kinds(groups) == per_layer(BLOCK)
    decay = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert decay["blocks.0.scale_shift_table"] == decay["blocks.0.bias_u"] == 0


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight-norm", "spectral", "orthogonal", "old-weight-norm", "old-spectral", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_is_computed_is_monitored_by_what_it_is_computed_from(change):
    model = two_blocks()
    for block in model.blocks:
        change(block.mlp[1])
    groups = checked_groups(model, weight_decay=0.1)
    assert kinds(groups) == per_layer(BLOCK)
    sizes = [p.shape for g in groups if g["tau"] for n, p in g["params"] if "mlp.1." in n]
    assert sizes == [(8, 12)] * 2


def test_the_optimizers_weight_decay_applies_unless_another_is_given():
    for given, expected in ((None, 0.3), (0.2, 0.2)):
        groups = grades_param_groups(two_blocks(), tau=2, weight_decay=given)
        opt = GradESAdamW(groups, weight_decay=0.3, grace_steps=1)
        found = {(g["tau"], g["weight_decay"]) for g in opt.param_groups}
        assert found == {(2.0, expected), (None, expected), (None, 0.0)}


def test_the_first_match_of_taus_wins_and_none_leaves_a_unit_unmonitored():
    model = two_blocks()
    taus = {r"blocks\.0\.attn": 0.1, "attn": 0.2, r"mlp\.1": None}
    groups = grades_param_groups(model, tau=1.0, taus=taus)
    tau_of = {name: group["tau"] for group in groups for name, _ in group["params"]}
    assert tau_of["blocks.0.attn.in_proj_weight"] == tau_of["blocks.0.attn.out_proj.weight"] == 0.1
    assert tau_of["blocks.1.attn.in_proj_weight"] == 0.2
    assert tau_of["blocks.0.mlp.0.weight"] == 1.0
    assert tau_of["blocks.0.mlp.1.weight"] is tau_of["head.weight"] is None
    assert_sound(model, groups)


@pytest.mark.parametrize("pattern", ["q_proj", r"lora_A", r"q_proj\.lora\.default$"])
def test_a_pattern_applies_to_the_whole_lora_pair(hf, peft, pattern):
    """A pattern that matches one factor alone must not separate the pair."""
    groups = grades_param_groups(lora_llama(hf, peft), tau=1.0, taus={pattern: 0.1})
    taus = {}
    for group in groups:
        for unit in monitored([group]):
            taus.setdefault(unit, set()).add(group["tau"])
    assert taus["model.layers.0.self_attn.q_proj.lora.default"] == {0.1}
    assert all(len(values) == 1 for values in taus.values())


@pytest.mark.parametrize("other", [{"tau": 2.0}, {"statistic": "norm"}], ids=str)
def test_groups_that_differ_about_a_lora_pair_are_refused(other):
    """A unit has one threshold and one statistic, also after a change of tau."""
    pair = [(f"layers.0.q.lora_{x}.weight", nn.Parameter(torch.ones(2, 2))) for x in "AB"]
    a, b = ({"params": [factor]} for factor in pair)
    different = r"'layers.0.q.lora' lie in groups with different tau or statistic"
    with pytest.raises(ValueError, match=different):
        GradESAdamW([dict(a), b | other], tau=1.0, grace_steps=0)
    opt = GradESAdamW([a, b], tau=1.0, grace_steps=0)
    opt.param_groups[1].update(other)
    with pytest.raises(ValueError, match=different):
        opt.step()


@pytest.mark.parametrize("argument", ["tau", "weight_decay", "taus"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1", True, torch.tensor(1.0)], ids=repr)
def test_numbers_out_of_range_raise(argument, value):
    argument, value = ("taus['attn']", {"attn": value}) if argument == "taus" else (argument, value)
    options = {"tau": 1.0, argument.partition("[")[0]: value}
    with pytest.raises(ValueError, match=rf"Invalid {re.escape(argument)}: .*\[0, inf\]"):
        grades_param_groups(in_list(Block()), **options)


@pytest.mark.parametrize("tau", [0, 0.0, 1, 1e-30, math.inf, "auto"], ids=repr)
def test_taus_of_at_least_0_and_auto_are_accepted(tau):
    groups = grades_param_groups(in_list(Block()), tau=tau)
    assert [group["tau"] for group in groups if group["tau"] is not None] == [tau]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"taus": {"(": 1.0}}, ValueError, r"'\(' is no regular expression"),
        ({"taus": {3: 1.0}}, ValueError, "3 is no regular expression"),
        ({"taus": {"attn": 1.0, "nowhere": 1.0}}, ValueError, "'nowhere' matches none of the 4"),
        ({"taus": {"head": 1.0}}, ValueError, "'head' matches none"),
        ({"taus": {"": None}}, ValueError, "every one of the 4 units"),
        ({"taus": [("attn", 1.0)]}, TypeError, "must be a mapping"),
        ({"model": [torch.zeros(2, 2)]}, TypeError, r"must be a torch\.nn\.Module"),
        ({"model": None}, TypeError, "model=None"),
    ],
    ids=["regex", "no-text", "no-match", "head", "all-none", "list", "tensors", "none"],
)
def test_other_invalid_arguments_raise(arguments, error, message):
    arguments = {"model": in_list(Block()), "tau": 1.0} | arguments
    with pytest.raises(error, match=message):
        grades_param_groups(**arguments)


@pytest.mark.parametrize("pattern", [r"^blocks\.0\.mlp\.0\.weight$", r"\.0\.attn"])
def test_a_threshold_for_untrained_units_alone_warns(pattern):
    model = in_list(Block(), Block())
    model.blocks[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=re.escape(f"no effect: {pattern!r}.")) as caught:
        groups = grades_param_groups(model, tau=1.0, taus={pattern: 2.0})
    assert caught[0].filename == __file__
    assert {group["tau"] for group in groups} == {None, 1.0}


@pytest.mark.parametrize(
    "pattern", [r"0\.self_attn\.q_proj\.lora\.default$", r"0\..*v_proj\.lora_A"]
)
def test_an_untrained_lora_pair_is_found_by_its_name_and_by_those_of_its_factors(hf, peft, pattern):
    model = lora_llama(hf, peft)
    model.get_base_model().model.layers[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=re.escape(f"no effect: {pattern!r}.")):
        grades_param_groups(model, tau=1.0, taus={pattern: 2.0})


def test_two_units_of_one_name_raise():
    inner, blocks = nn.ModuleDict({"blocks": nn.ModuleList(linears(8))}), nn.ModuleList(linears(8))
    model = nn.ModuleDict({"blocks": blocks, "module": inner})
    with pytest.raises(ValueError, match=r"both called 'blocks\.0\.weight'"):
        grades_param_groups(model, tau=1.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU(), "nothing to monitor in ReLU.*no parameters"),
        (
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
            r"4 tensors \('0\.weight'.*Linear \(2\); 0 of the tensors have requires_grad=False"
            r".*pass model\.named_parameters\(\)",
        ),
        (
            two_blocks().requires_grad_(False),
            "33 of the tensors have requires_grad=False, among them 8 of the 8.*requires_grad=True",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), r"Conv2d \(2\)"),
    ],
    ids=["no-parameters", "no-blocks", "all-frozen", "convolutions"],
)
def test_the_error_for_nothing_to_monitor_lists_tensors_and_modules(model, message):
    with pytest.raises(ValueError, match=message):
        grades_param_groups(model, tau=1.0)


def test_verbose_prints_the_monitored_units_and_the_other_tensors(capsys):
    grades_param_groups(two_blocks(), tau=1.5, taus={"out_proj": None}, verbose=True)
    printed = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    assert "Model: 8 units" in printed
    assert ["kind", "units", "shape", "elements", "tau"] in rows
    assert ["attn.in_proj_weight", "2", "24x8", "384", "1.5"] in rows
    assert ["attn.out_proj", "2", "8x8", "128", "None"] in rows
    assert ["embedding", "1", "80"] in rows
    assert ["output head", "1", "80"] in rows


def test_verbose_prints_one_table_if_all_trainable_tensors_are_monitored(hf, peft, capsys):
    grades_param_groups(lora_llama(hf, peft), tau=1.0, verbose=True)
    printed = capsys.readouterr().out
    assert "2x16 + 16x2" in printed
    assert "not monitored" not in printed
    grades_param_groups(in_list(Block()), tau=1.0)
    assert capsys.readouterr().out == ""  # nothing is printed by default
