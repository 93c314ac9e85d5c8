"""Units: which tensors GradES watches, what they are called, and the groups that carry them.

The contract:

* `unit_of` judges by name and shape alone. What is clearly an embedding, an output head, a norm, a
  bias or a router is left out, every other matrix is taken; words count as whole words only.
* `grades_param_groups` takes linear layers in repeated blocks. On every model class the number and
  the kinds of its units are known exactly, and `unit_of` accepts every one of them.
* The prefixes of wrappers change nothing, and every trainable tensor is in exactly one group.

All models are built from tiny configurations, without weights from anywhere.
"""

import copy
import math
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from grades_kernels import GradESAdamW, grades_param_groups, units
from grades_kernels.units import canonical_name, place_of, unit_of

MATRIX = (24, 16)


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
    return dict(Counter(place_of(unit)[1] for unit in monitored(groups)))


def per_layer(names, layers=2):
    return dict.fromkeys(names.split(), layers)


# Names


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.fc.weight",
        "module.layers.0.fc.weight",
        "module.module.layers.0.fc.weight",
        "_orig_mod.layers.0.fc.weight",
        "layers.0._orig_mod.fc.weight",
        "_orig_mod.module.layers.0.fc.weight",
        "module._orig_mod.layers.0.fc.weight",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.fc.weight",
        "layers.0._checkpoint_wrapped_module.fc.weight",
        "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.fc.weight",
        "base_model.model.layers.0.fc.weight",
        "module.base_model.model.layers.0.fc.weight",
        "_orig_mod.base_model.model.layers.0.fc.weight",
        "base_model.model._orig_mod.layers.0.fc.weight",
    ],
)
def test_wrappers_leave_the_name_alone(name):
    assert canonical_name(name) == "layers.0.fc.weight"
    assert unit_of(name, MATRIX, torch.float32) == "layers.0.fc.weight"


@pytest.mark.parametrize(
    "name",
    [
        "module",
        "a",
        "decoder.module.fc.weight",
        "model.base_model.fc.weight",
        "my_module.fc.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_names_of_the_model_itself_stay(name):
    assert canonical_name(name) == name


NAMES = {
    None: """
        a weight 0.weight fc1.weight fc.weight w1 encoder.weight net.2.weight out.weight
        layers.0.attn.q_proj.weight model.layers.0.mlp.gate_proj.weight
        transformer.h.0.attn.c_attn.weight overhead_proj.weight header.weight headwise.weight
        normalizer_proj.weight embedder_proj.weight prenormal.weight biased.weight
        routers_guide.weight blocks.0.attn.head_proj.weight blocks.0.sa.heads.0.key.weight
        sa_head.key.weight blocks.0.multi_head.q.weight blocks.0.score.weight
        score.layers.0.fc.weight blocks.0.norm1.linear.weight adaLN_modulation.1.weight
        bias_proj.weight token_mixer.weight encoder.proj_out.weight
        layers.0.attention.output.weight encoder.layer.0.attention.output.dense.weight
        layers.0.shared.weight layers.0.mlp.shared_expert.up_proj.weight
        experts.0.gate.weight layers.0.mlp.experts.gate_up_proj
        block.0.layer.1.EncDecAttention.q.weight layers.0.attn.in_proj_weight
        deberta.encoder.layer.0.attention.self.pos_key_proj.weight
        embed_model.layers.0.fc.weight q_proj.base_layer.weight
        """,
    "embedding": """
        embed_tokens.weight wte.weight wpe.weight shared.weight model.shared.weight
        tok_embeddings.weight tokenEmbedding.weight module.embed_tokens.weight
        model.decoder.embed_positions.weight bert.embeddings.word_embeddings.weight
        embeddings.patch_embeddings.projection.weight patch_embed.proj.weight pos_embed
        position_embeddings pos.weight pe positional_encoding.pe pos_enc.weight cls_token
        register_tokens gpt_neox.embed_in.weight rel_embeddings.weight embed_tokens.0.weight
        electra.embeddings_project.weight embed_tokens.base_layer.weight mask_emb
        embed_tokens.modules_to_save.default.weight prompt_encoder.default.embedding.weight
        layers.0.rel_attn.seg_embed embed_tokens.lora_embedding_A.default
        """,
    "output head": """
        head.weight lm_head.weight classifier.weight score.weight LMHead.weight
        heads.head.weight lm_heads.0.weight model.layers.61.shared_head.head.weight
        classifier.out_proj.weight cls.predictions.decoder.weight
        cls.predictions.transform.dense.weight qa_outputs.weight output.weight
        model.output.weight decoder.weight proj_out.weight vocab_projector.weight
        pre_classifier.weight decode_head.linear_projections.0.proj.weight
        bert.pooler.dense.weight lm_head.base_layer.weight lm_head.lora_A.default.weight
        score.modules_to_save.default.weight discriminator_predictions.dense.weight
        logits_proj.weight classification_head.dense.weight
        """,
    "norm": """
        ln_f.weight ln_1.weight norm.weight q_norm.weight norm_f.weight norms.0.weight
        LayerNorm.weight RMSNorm.weight layers.0.input_layernorm.weight
        """,
    "bias": """
        bias fc.bias layers.0.SelfAttention.relative_attention_bias.weight in_proj_bias
        layers.0.relative_position_bias_table layers.0.mlp.experts.gate_up_proj_bias
        """,
    "router": """
        layers.0.mlp.router.weight layers.0.mlp.router.classifier.weight
        layers.0.mlp.shared_expert_gate.weight
        """,
}
"""What a name says a matrix is (None: nothing but a matrix)."""

MONITORED = NAMES[None].split()
UNMONITORED = [(role, name) for role, names in NAMES.items() if role for name in names.split()]


@pytest.mark.parametrize("name", MONITORED)
def test_a_matrix_is_monitored_unless_its_name_says_otherwise(name):
    assert unit_of(name, MATRIX, torch.float32) == name


@pytest.mark.parametrize(("role", "name"), UNMONITORED)
def test_names_that_leave_a_matrix_unmonitored(role, name):
    assert unit_of(name, MATRIX, torch.float32) is None
    assert units._role(name, MATRIX, torch.float32) == role


def test_the_name_tables_notice_substring_rules():
    """Negative control: the obvious rule, "the name contains a word", fails both tables."""
    words = ("embed", "head", "norm", "bias", "wte", "score")

    def by_substring(name):
        return not any(word in name for word in words)

    assert not all(by_substring(name) for name in MONITORED)
    assert any(by_substring(name) for _, name in UNMONITORED)


@pytest.mark.parametrize("word", ["head", "embed", "norm", "router"])
def test_the_name_tables_notice_a_missing_rule(word, monkeypatch):
    """Negative control: without the rule for one word, names of the table become units."""
    never = units.re.compile(r"(?!)")
    if word == "head":
        monkeypatch.setattr(units, "_HEAD", never)
    elif word == "embed":
        monkeypatch.setattr(units, "_EMBEDDING_WORDS", frozenset())
    elif word == "norm":
        monkeypatch.setattr(units, "_NORM_WORDS", frozenset())
    else:
        monkeypatch.setattr(units, "_EXPERT_GATE", never)
    assert any(unit_of(name, MATRIX, torch.float32) for _, name in UNMONITORED)


@pytest.mark.parametrize(
    ("shape", "dtype", "is_unit"),
    [
        ((24, 16), torch.float32, True),
        ((24, 16), torch.bfloat16, True),
        ((24, 16), torch.float8_e4m3fn, True),
        ((1, 16), torch.float32, True),
        ((16, 1), torch.float32, True),
        ((1, 1), torch.float32, True),
        ((4, 24, 16), torch.float32, True),
        ((8, 3, 3, 3), torch.float32, True),
        ((), torch.float32, False),
        ((16,), torch.float32, False),
        ((1, 1, 16), torch.float32, False),
        ((1, 16, 1, 1), torch.float32, False),
        ((0, 16), torch.float32, False),
        ((16, 0), torch.float32, False),
        ((24, 16), torch.complex64, False),
        ((24, 16), torch.int8, False),
        ((24, 16), torch.uint8, False),
        ((24, 16), torch.bool, False),
    ],
    ids=str,
)
def test_shapes_and_dtypes(shape, dtype, is_unit):
    assert unit_of("layers.0.fc.weight", shape, dtype) == (
        "layers.0.fc.weight" if is_unit else None
    )


@pytest.mark.parametrize(
    ("name", "shape", "is_unit"),
    [
        ("layers.0.mlp.gate.weight", (8, 64), False),
        ("layers.0.block_sparse_moe.gate.weight", (8, 64), False),
        ("layers.0.mlp.gate.weight", (172, 64), True),
        ("layers.0.mlp.gate.weight", (64, 64), True),
        ("layers.0.mlp.experts.3.gate.weight", (16, 64), True),
        ("layers.0.mlp.shared_experts.gate.weight", (16, 64), True),
        ("layers.0.mlp.gate_proj.weight", (16, 64), True),
    ],
)
def test_a_gate_is_a_router_only_where_it_narrows_outside_the_experts(name, shape, is_unit):
    assert (unit_of(name, shape, torch.float32) is not None) == is_unit


@pytest.mark.parametrize(
    ("factors", "unit"),
    [
        (
            ["m.0.q_proj.lora_A.default.weight", "m.0.q_proj.lora_B.default.weight"],
            "m.0.q_proj.lora.default",
        ),
        (
            ["m.0.q_proj.lora_A.other.weight", "module.m.0.q_proj.lora_B.other.weight"],
            "m.0.q_proj.lora.other",
        ),
        (["m.0.q_proj.lora_A", "m.0.q_proj.lora_B"], "m.0.q_proj.lora"),
        (["m.0.q_proj.lora_a.weight", "m.0.q_proj.lora_b.weight"], "m.0.q_proj.lora"),
        (
            [f"m.0.q_proj.lora_{factor}.default" for factor in "ABE"],
            "m.0.q_proj.lora.default",
        ),
    ],
    ids=["peft", "adapter-other", "bare-parameters", "lower-case", "adalora"],
)
def test_lora_factors_are_one_unit(factors, unit):
    assert {unit_of(name, (2, 16), torch.float32) for name in factors} == {unit}


@pytest.mark.parametrize(
    ("unit", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("model.layers.11.mlp.gate_up_proj.weight", (11, "gate_up_proj")),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", (2, "kv_a_proj_with_mqa")),
        ("transformer.h.0.attn.c_attn.weight", (0, "attn.c_attn")),
        ("transformer.h.0.attn.c_proj.weight", (0, "attn.c_proj")),
        ("transformer.h.0.mlp.c_proj.weight", (0, "mlp.c_proj")),
        ("bert.encoder.layer.1.attention.self.query.weight", (1, "attention.self.query")),
        ("bert.encoder.layer.1.attention.output.dense.weight", (1, "attention.output.dense")),
        ("bert.encoder.layer.1.intermediate.dense.weight", (1, "intermediate.dense")),
        ("bert.encoder.layer.1.output.dense.weight", (1, "output.dense")),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", (1, "SelfAttention.q")),
        ("decoder.block.1.layer.0.SelfAttention.q.weight", (1, "decoder.SelfAttention.q")),
        ("decoder.block.1.layer.1.EncDecAttention.q.weight", (1, "decoder.EncDecAttention.q")),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", (0, "vision.q_proj")),
        ("model.visual.blocks.0.attn.qkv.weight", (0, "vision.qkv")),
        ("model.layers.0.block_sparse_moe.experts.5.w1.weight", (0, "experts.w1")),
        ("model.layers.0.mlp.experts.5.gate_proj.weight", (0, "experts.gate_proj")),
        ("model.layers.0.mlp.experts.gate_up_proj", (0, "experts.gate_up_proj")),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (0, "shared_expert.up_proj")),
        ("model.layers.4.self_attn.q_proj.lora.default", (4, "q_proj.lora")),
        ("model.layers.4.self_attn.q_proj.lora.other", (4, "q_proj.lora")),
        ("model.layers.4.self_attn.q_proj.lora", (4, "q_proj.lora")),
        ("model.layers.4.self_attn.q_proj.base_layer.weight", (4, "q_proj")),
        ("model.layers.4.mlp.down_proj.modules_to_save.other.weight", (4, "down_proj")),
        ("blocks.0.mlp.0.weight", (0, "mlp.0")),
        ("blocks.0.mlp.2.weight", (0, "mlp.2")),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", (3, "mlp.0")),
        ("layer2.0.fc.weight", (2, "0.fc")),
        ("0.weight", (0, "weight")),
        ("net.2.weight", (2, "net")),
        ("fc1.weight", (None, "fc1")),
        ("encoder.proj.weight", (None, "encoder.proj")),
        ("weight", (None, "weight")),
        ("lora", (None, "lora")),
        ("a", (None, "a")),
        ("group0.param3", (None, "group0")),
        ("group12.param3", (None, "group12")),
    ],
)
def test_place_of(unit, place):
    assert place_of(unit) == place


# Model classes of transformers

LM = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MHA_LM = {key: value for key, value in LM.items() if key != "num_key_value_heads"}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
}
MOE = {"moe_intermediate_size": 8, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}

LLAMA = per_layer("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj")
ATTENTION = per_layer("q_proj k_proj v_proj o_proj")
OUT_PROJ_BLOCK = "q_proj k_proj v_proj self_attn.out_proj fc1 fc2"
BERT = per_layer(
    "attention.self.query attention.self.key attention.self.value attention.output.dense "
    "intermediate.dense output.dense"
)
EXPERTS = per_layer("experts.gate_up_proj experts.down_proj")


def decoder(names):
    return per_layer(" ".join(f"decoder.{name}" for name in names.split()))


CROSS_ATTENTION = " ".join(f"encoder_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj"))
T5_ATTENTION = " ".join(f"SelfAttention.{p}" for p in "qkvo")
T5_CROSS = " ".join(f"EncDecAttention.{p}" for p in "qkvo")


def model_of(name, config, **settings):
    return lambda hf: getattr(hf, name)(getattr(hf, config)(**settings))


# id: how to build it, the kinds of its units with their numbers, one name in full
TRANSFORMERS = {
    "llama": (
        model_of("LlamaForCausalLM", "LlamaConfig", **LM),
        LLAMA,
        "model.layers.1.mlp.down_proj.weight",
    ),
    "llama-one-layer-tied": (
        model_of(
            "LlamaForCausalLM",
            "LlamaConfig",
            **{**LM, "num_hidden_layers": 1},
            tie_word_embeddings=True,
        ),
        dict.fromkeys(LLAMA, 1),
        "model.layers.0.self_attn.q_proj.weight",
    ),
    "llama-classification": (
        model_of("LlamaForSequenceClassification", "LlamaConfig", **LM),
        LLAMA,
        "model.layers.0.self_attn.q_proj.weight",
    ),
    "qwen3": (
        model_of("Qwen3ForCausalLM", "Qwen3Config", **LM, head_dim=8),
        LLAMA,
        "model.layers.0.self_attn.k_proj.weight",
    ),
    "mistral": (
        model_of("MistralForCausalLM", "MistralConfig", **LM),
        LLAMA,
        "model.layers.0.mlp.up_proj.weight",
    ),
    "gemma2": (
        model_of("Gemma2ForCausalLM", "Gemma2Config", **LM, head_dim=8),
        LLAMA,
        "model.layers.0.mlp.gate_proj.weight",
    ),
    "phi3-fused": (
        model_of("Phi3ForCausalLM", "Phi3Config", **LM),
        per_layer("qkv_proj o_proj gate_up_proj down_proj"),
        "model.layers.0.self_attn.qkv_proj.weight",
    ),
    "gpt2-conv1d": (
        model_of(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
        ),
        per_layer("attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        "transformer.h.0.attn.c_attn.weight",
    ),
    "gpt-neox": (
        model_of("GPTNeoXForCausalLM", "GPTNeoXConfig", **MHA_LM),
        per_layer("query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        "gpt_neox.layers.0.attention.query_key_value.weight",
    ),
    "opt-projected": (
        model_of(
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=32,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=8,
        ),
        decoder(OUT_PROJ_BLOCK),
        "model.decoder.layers.0.fc1.weight",
    ),
    "falcon": (
        model_of(
            "FalconForCausalLM",
            "FalconConfig",
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        per_layer("query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        "transformer.h.0.self_attention.query_key_value.weight",
    ),
    "bert-masked-lm": (
        model_of("BertForMaskedLM", "BertConfig", **MHA_LM),
        BERT,
        "bert.encoder.layer.0.attention.self.query.weight",
    ),
    "bert-classification": (
        model_of("BertForSequenceClassification", "BertConfig", **MHA_LM),
        BERT,
        "bert.encoder.layer.0.attention.output.dense.weight",
    ),
    "roberta": (
        model_of("RobertaForSequenceClassification", "RobertaConfig", **MHA_LM),
        BERT,
        "roberta.encoder.layer.0.output.dense.weight",
    ),
    "t5-two-stacks": (
        model_of("T5ForConditionalGeneration", "T5Config", **T5),
        per_layer(f"{T5_ATTENTION} DenseReluDense.wi DenseReluDense.wo")
        | decoder(f"{T5_ATTENTION} {T5_CROSS} DenseReluDense.wi DenseReluDense.wo"),
        "decoder.block.1.layer.1.EncDecAttention.q.weight",
    ),
    "t5-one-layer-gated": (
        model_of(
            "T5ForConditionalGeneration",
            "T5Config",
            **{**T5, "num_layers": 1},
            feed_forward_proj="gated-gelu",
        ),
        dict.fromkeys(
            per_layer(f"{T5_ATTENTION} DenseReluDense.wi_0 DenseReluDense.wi_1 DenseReluDense.wo")
            | decoder(
                f"{T5_ATTENTION} {T5_CROSS} DenseReluDense.wi_0 DenseReluDense.wi_1 "
                "DenseReluDense.wo"
            ),
            1,
        ),
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
    ),
    "whisper": (
        model_of(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
        ),
        per_layer(OUT_PROJ_BLOCK) | decoder(f"{OUT_PROJ_BLOCK} {CROSS_ATTENTION}"),
        "model.decoder.layers.0.encoder_attn.q_proj.weight",
    ),
    "vit": (
        model_of("ViTForImageClassification", "ViTConfig", **VISION),
        ATTENTION | per_layer("fc1 fc2"),
        None,
    ),
    "clip-two-towers": (
        model_of(
            "CLIPModel",
            "CLIPConfig",
            text_config={**MHA_LM, "projection_dim": 16},
            vision_config={**VISION, "projection_dim": 16},
            projection_dim=16,
        ),
        per_layer(OUT_PROJ_BLOCK)
        | per_layer(" ".join(f"vision.{name}" for name in OUT_PROJ_BLOCK.split())),
        "vision_model.encoder.layers.0.mlp.fc1.weight",
    ),
    "mixtral-stacked-experts": (
        model_of("MixtralForCausalLM", "MixtralConfig", **LM, num_local_experts=4),
        ATTENTION | EXPERTS,
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "qwen3-moe": (
        model_of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **LM, **MOE, head_dim=8, num_experts=4),
        ATTENTION | EXPERTS,
        "model.layers.1.mlp.experts.down_proj",
    ),
    "qwen2-moe-shared-expert": (
        model_of(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **LM,
            **MOE,
            num_experts=4,
            shared_expert_intermediate_size=16,
        ),
        ATTENTION
        | EXPERTS
        | per_layer("shared_expert.gate_proj shared_expert.up_proj shared_expert.down_proj"),
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
    ),
    "gpt-oss-expert-biases": (
        model_of(
            "GptOssForCausalLM",
            "GptOssConfig",
            **LM,
            head_dim=8,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        ATTENTION | EXPERTS,
        "model.layers.0.mlp.experts.down_proj",
    ),
    "deepseek-v3-dense-then-moe": (
        model_of(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **{**LM, "num_key_value_heads": 2},
            **MOE,
            **DEEPSEEK,
        ),
        per_layer("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj")
        | per_layer("gate_proj up_proj down_proj experts.gate_up_proj experts.down_proj", layers=1)
        | per_layer(
            "shared_experts.gate_proj shared_experts.up_proj shared_experts.down_proj", layers=1
        ),
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    ),
    "mamba": (
        model_of(
            "MambaForCausalLM",
            "MambaConfig",
            vocab_size=32,
            hidden_size=16,
            state_size=4,
            num_hidden_layers=2,
        ),
        per_layer("mixer.in_proj mixer.x_proj mixer.dt_proj mixer.out_proj"),
        "backbone.layers.0.mixer.in_proj.weight",
    ),
    "rwkv-mixing-vectors": (
        model_of(
            "RwkvForCausalLM",
            "RwkvConfig",
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            context_length=16,
        ),
        per_layer(
            "attention.key attention.value attention.receptance attention.output "
            "feed_forward.key feed_forward.value feed_forward.receptance"
        ),
        "rwkv.blocks.0.attention.output.weight",
    ),
}


@pytest.fixture
def hf():
    return pytest.importorskip("transformers")


def check_transformers_case(hf, case):
    """Exact units of one model class, in agreement with `unit_of` and with the optimizer."""
    build, expected, name = TRANSFORMERS[case]
    model = build(hf)
    groups = grades_param_groups(model, tau=0.5, weight_decay=0.1)
    assert kinds(groups) == expected
    assert name is None or name in monitored(groups)
    assert len(monitored(groups)) == sum(expected.values())
    assert_sound(model, groups)
    expected_units = list(monitored(groups))
    optimizer = GradESAdamW(groups, tau=0.5, grace_steps=1)
    assert optimizer.monitored_units == expected_units


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_units_of_transformers_models(hf, case):
    check_transformers_case(hf, case)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("gpt2-conv1d", ("_is_transformers_conv1d", lambda module: False)),
        ("mixtral-stacked-experts", ("_is_linear_weight", lambda m, n, t: t.dim() == 2)),
        ("qwen2-moe-shared-expert", ("_EXPERT_GATE", units.re.compile("(?!)"))),
        ("opt-projected", ("_blocks", lambda model: [model])),
        ("clip-two-towers", ("_second_stack", lambda stack: "")),
    ],
    ids=["no-conv1d", "no-3d-experts", "routers", "whole-model-as-block", "one-tower"],
)
def test_the_model_classes_notice_faults(hf, case, fault, monkeypatch):
    """Negative control: a rule taken out is seen by the case that it was made for."""
    monkeypatch.setattr(units, *fault)
    with pytest.raises((AssertionError, ValueError)):
        check_transformers_case(hf, case)


def test_names_alone_find_the_same_units_in_a_language_model(hf):
    """`model.named_parameters()` and tau are enough for a decoder."""
    model = TRANSFORMERS["llama"][0](hf)
    by_name = GradESAdamW(model.named_parameters(), tau=0.5, grace_steps=1)
    by_module = GradESAdamW(grades_param_groups(model, tau=0.5), grace_steps=1)
    assert by_name.monitored_units == by_module.monitored_units


# PEFT


def lora_llama(hf, adapter="default", **settings):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]} | settings
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LM))
    return peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name=adapter)


@pytest.mark.parametrize("adapter", ["default", "other", "weight"])
def test_lora_pairs_are_the_units(hf, adapter):
    model = lora_llama(hf, adapter)
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    found = monitored(groups)
    assert list(found) == [
        f"model.layers.{layer}.self_attn.{matrix}.lora.{adapter}"
        for layer in (0, 1)
        for matrix in ("q_proj", "v_proj")
    ]
    prefix = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{{}}.{adapter}.weight"
    assert found[f"model.layers.0.self_attn.q_proj.lora.{adapter}"] == [
        prefix.format("A"),
        prefix.format("B"),
    ]
    assert kinds(groups) == per_layer("q_proj.lora v_proj.lora")


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]], ids=str)
def test_of_two_adapters_only_what_trains_is_taken(hf, active):
    peft = pytest.importorskip("peft")
    model = lora_llama(hf)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(active)
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    expected = Counter()
    if "default" in active:
        expected |= Counter(default=4)
    if "other" in active:
        expected |= Counter(other=2)
    assert Counter(unit.rpartition(".")[2] for unit in monitored(groups)) == expected


def test_lora_beside_embedding_head_dora_and_a_module_trained_in_full(hf):
    """Rank 1 included: its factors have a dimension of 1 and are matrices still."""
    model = lora_llama(
        hf,
        r=1,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        modules_to_save=["down_proj"],
        use_dora=True,
    )
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    assert kinds(groups) == per_layer("q_proj.lora down_proj")


def test_a_base_layer_that_trains_too_is_a_unit_of_its_own(hf):
    model = lora_llama(hf)
    base = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    base.weight.requires_grad_(True)
    found = monitored(grades_param_groups(model, tau=0.5))
    assert len(found) == 5
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in found


def test_lora_on_gpt2_and_on_stacked_experts(hf):
    peft = pytest.importorskip("peft")
    gpt2 = peft.get_peft_model(
        TRANSFORMERS["gpt2-conv1d"][0](hf),
        peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True),
    )
    assert kinds(grades_param_groups(gpt2, tau=0.5)) == per_layer("attn.c_attn.lora")

    mixtral = peft.get_peft_model(
        TRANSFORMERS["mixtral-stacked-experts"][0](hf),
        peft.LoraConfig(
            r=2,
            target_modules=[],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    groups = grades_param_groups(mixtral, tau=0.5)
    assert_sound(mixtral, groups)
    assert kinds(groups) == {"experts.lora": 4}


def test_adalora_has_three_factors(hf):
    peft = pytest.importorskip("peft")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LM))
    config = peft.AdaLoraConfig(r=2, target_modules=["q_proj"], total_step=10)
    found = monitored(grades_param_groups(peft.get_peft_model(model, config), tau=0.5))
    assert [len(names) for names in found.values()] == [3, 3]


def test_an_adapter_without_lora_factors_names_the_way_out(hf):
    peft = pytest.importorskip("peft")
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LM))
    config = peft.LoHaConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match=r"hada_w1_a.*14 of the 14 .*named_parameters\(\)"):
        grades_param_groups(model, tau=0.5)


# Models of users


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


BLOCK = ["attn.in_proj_weight", "attn.out_proj", "mlp.0", "mlp.1"]


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: nn.ModuleList([Block(), Block(), Block()]), 3),
        (lambda: nn.ModuleList([Block()]), 1),
        (lambda: nn.Sequential(Block(), Block()), 2),
        (lambda: nn.Sequential(Block()), 1),
        (lambda: nn.Sequential(nn.Linear(8, 8), Block(), Block(), nn.Linear(8, 8)), 2),
        (lambda: nn.ModuleDict({"0": Block(), "1": Block()}), 2),
    ],
    ids=["list", "list-of-one", "sequential", "sequential-of-one", "with-stem-and-head", "dict"],
)
def test_blocks_are_found_in_every_container(make, layers):
    model = Model(make())
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    assert kinds(groups) == dict.fromkeys(BLOCK, layers)


def test_a_shell_around_the_model_is_no_block():
    model = nn.Sequential(Model(nn.ModuleList([Block(), Block()])))
    assert len(monitored(grades_param_groups(model, tau=0.5))) == 8


def test_blocks_at_the_root_and_blocks_that_are_sequentials():
    root = nn.Sequential(Block(), Block())
    assert len(monitored(grades_param_groups(root, tau=0.5))) == 8
    plain = nn.Sequential(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        nn.Linear(8, 2),
    )
    assert list(monitored(grades_param_groups(plain, tau=0.5))) == ["0.0.weight", "1.0.weight"]
    listed = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
    assert len(monitored(grades_param_groups(listed, tau=0.5))) == 3


def test_blocks_of_different_classes_side_by_side():
    class Other(Block):
        pass

    assert len(monitored(grades_param_groups(Model(nn.ModuleList([Block(), Other()])), tau=1))) == 8


def test_experts_as_modules_and_a_linear_router():
    model = Model(nn.ModuleList([Block(moe=True), Block(moe=True)]))
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    assert kinds(groups) == {"attn.in_proj_weight": 2, "attn.out_proj": 2, "experts.w1": 6}


def test_torch_transformer_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert kinds(grades_param_groups(model, tau=0.5)) == per_layer(
        "self_attn.in_proj_weight self_attn.out_proj linear1 linear2"
    )


@pytest.mark.parametrize("first", ["block", "head"])
def test_a_weight_tied_to_the_head_is_never_monitored(first):
    """`named_parameters` shows one name of a tied tensor; the hidden one counts as well."""
    model = Model(nn.ModuleList([nn.Linear(8, 10), nn.Linear(8, 10)]))
    if first == "head":
        head = model.head
        del model.head
        model = nn.ModuleDict({"head": head, "blocks": model.blocks})
    tied = model["head"] if first == "head" else model.head
    tied.weight = (model["blocks"] if first == "head" else model.blocks)[0].weight

    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    assert list(monitored(groups)) == ["blocks.1.weight"]

    if first == "block":  # negative control: judged by its first name it would be monitored
        model.named_parameters = lambda **kwargs: nn.Module.named_parameters(model)
        assert "blocks.0.weight" in monitored(grades_param_groups(model, tau=0.5))


def test_one_block_used_twice_is_monitored_once():
    block = Block()
    model = Model(nn.ModuleList([block, block]))
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    assert len(monitored(groups)) == 4


def test_what_does_not_train_is_left_out():
    model = Model(nn.ModuleList([Block(), Block()]))
    model.blocks[0].requires_grad_(False)
    model.embed.requires_grad_(False)
    groups = grades_param_groups(model, tau=0.5)
    assert_sound(model, groups)
    assert all(unit.startswith("blocks.1.") for unit in monitored(groups))


# Wrappers


class Wrapper(nn.Module):
    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


def wrap_in(*names):
    def wrap(model):
        for name in names:
            model = Wrapper(name, model)
        return model

    return wrap


def wrap_every_block(name):
    def wrap(model):
        model.blocks = nn.ModuleList(Wrapper(name, block) for block in model.blocks)
        return model

    return wrap


def checkpoint_every_block(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks = nn.ModuleList(map(checkpoint_wrapper, model.blocks))
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        wrap_in("module"),
        wrap_in("_orig_mod", "module"),
        wrap_in("module", "_orig_mod"),
        wrap_in("model", "base_model"),
        wrap_in("_fsdp_wrapped_module"),
        wrap_every_block("_fsdp_wrapped_module"),
        wrap_every_block("_orig_mod"),
        checkpoint_every_block,
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        torch.compile,
    ],
    ids=[
        "module",
        "ddp-of-compiled",
        "compiled-ddp",
        "peft",
        "fsdp-root",
        "fsdp-blocks",
        "compiled-blocks",
        "checkpointed-blocks",
        "data-parallel",
        "averaged",
        "torch-compile",
    ],
)
def test_wrappers_are_seen_through(wrap):
    model = Model(nn.ModuleList([Block(), Block()]))
    bare = monitored(grades_param_groups(copy.deepcopy(model), tau=0.5))
    wrapped = wrap(model)
    groups = grades_param_groups(wrapped, tau=0.5, taus={r"^blocks\.0\.": 0.25})
    assert_sound(wrapped, groups)
    assert list(monitored(groups)) == list(bare)
    assert sum(group["tau"] == 0.25 for group in groups) == 1


# Groups


def test_groups_carry_tau_decay_and_names():
    model = Model(nn.ModuleList([Block(), Block()]))
    groups = grades_param_groups(model, tau=2, weight_decay=0.3)
    by_setting = {(group["tau"], group["weight_decay"]): group for group in groups}
    assert by_setting.keys() == {(2.0, 0.3), (None, 0.3), (None, 0.0)}
    assert {name for name, _ in by_setting[None, 0.3]["params"]} == {
        "embed.weight",
        "stem.weight",
        "projector.0.weight",
        "projector.2.weight",
        "head.weight",
        "blocks.0.conv.weight",
        "blocks.1.conv.weight",
    }
    optimizer = torch.optim.AdamW(groups)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert grades_param_groups(model, tau=2)[0]["weight_decay"] == 1e-2


@pytest.mark.parametrize("fault", ["embedding", "twice", "missing", "decay"])
def test_unsound_groups_are_noticed(fault):
    """Negative control of `assert_sound`: groups that are wrong on purpose."""
    model = Model(nn.ModuleList([Block(), Block()]))
    watched, matrices, vectors = sorted(
        grades_param_groups(model, tau=2), key=lambda g: (g["tau"] is None, -g["weight_decay"])
    )
    if fault == "embedding":
        matrices["tau"] = 2.0
    elif fault == "twice":
        matrices["params"].append(watched["params"][0])
    elif fault == "missing":
        watched["params"].pop()
    else:
        vectors["weight_decay"] = 1e-2
    with pytest.raises(AssertionError):
        assert_sound(model, [watched, matrices, vectors])


def test_taus_first_match_wins_and_none_leaves_out():
    model = Model(nn.ModuleList([Block(), Block()]))
    groups = grades_param_groups(
        model,
        tau=1.0,
        taus={r"blocks\.0\.attn": 0.1, "attn": 0.2, r"mlp\.1": None},
    )
    tau_of = {name: group["tau"] for group in groups for name, _ in group["params"]}
    assert tau_of["blocks.0.attn.in_proj_weight"] == 0.1
    assert tau_of["blocks.0.attn.out_proj.weight"] == 0.1
    assert tau_of["blocks.1.attn.in_proj_weight"] == 0.2
    assert tau_of["blocks.0.mlp.0.weight"] == 1.0
    assert tau_of["blocks.0.mlp.1.weight"] is None
    assert tau_of["head.weight"] is None
    assert_sound(model, groups)


@pytest.mark.parametrize("pattern", ["q_proj", r"lora_A", r"q_proj\.lora\.default$"])
def test_a_pattern_moves_the_whole_lora_pair(hf, pattern):
    """A pattern that matches one factor alone must not tear the pair apart."""
    groups = grades_param_groups(lora_llama(hf), tau=1.0, taus={pattern: 0.1})
    taus = {}
    for group in groups:
        for name, tensor in group["params"]:
            taus.setdefault(unit_of(name, tensor.shape, tensor.dtype), set()).add(group["tau"])
    assert taus["model.layers.0.self_attn.q_proj.lora.default"] == {0.1}
    assert all(len(values) == 1 for values in taus.values())


# Bad input


@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1", None, True, torch.tensor(1.0)], ids=repr)
@pytest.mark.parametrize("argument", ["tau", "weight_decay"])
def test_numbers_out_of_range(argument, value):
    with pytest.raises(ValueError, match=f"Invalid {argument}: .*at least 0"):
        grades_param_groups(Model(nn.ModuleList([Block()])), **{"tau": 1.0, argument: value})


@pytest.mark.parametrize("value", [-1.0, math.nan, "0.1", True], ids=repr)
def test_taus_out_of_range(value):
    with pytest.raises(ValueError, match=r"Invalid taus\['attn'\]: .*at least 0"):
        grades_param_groups(Model(nn.ModuleList([Block()])), tau=1.0, taus={"attn": value})


@pytest.mark.parametrize("tau", [0, 0.0, 1, 1e-30, math.inf], ids=repr)
def test_numbers_in_range(tau):
    groups = grades_param_groups(Model(nn.ModuleList([Block()])), tau=tau)
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
def test_other_bad_input(arguments, error, message):
    arguments = {"model": Model(nn.ModuleList([Block()])), "tau": 1.0} | arguments
    with pytest.raises(error, match=message):
        grades_param_groups(**arguments)


def test_two_tensors_of_one_name():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([nn.Linear(4, 4)]),
            "module": nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])}),
        }
    )
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
            Model(nn.ModuleList([Block(), Block()])).requires_grad_(False),
            "33 of the tensors have requires_grad=False, among them 8 of the 8.*requires_grad=True",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), r"Conv2d \(2\)"),
    ],
    ids=["no-parameters", "no-blocks", "all-frozen", "convolutions"],
)
def test_nothing_to_monitor_says_what_was_seen(model, message):
    with pytest.raises(ValueError, match=message):
        grades_param_groups(model, tau=1.0)


# The table


@pytest.mark.parametrize("has_rich", [True, False], ids=["rich", "plain"])
def test_verbose_prints_what_was_matched_and_what_was_not(has_rich, monkeypatch, capsys):
    if has_rich:
        pytest.importorskip("rich")
        monkeypatch.setenv("COLUMNS", "100")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    model = Model(nn.ModuleList([Block(), Block()]))
    grades_param_groups(model, tau=1.5, taus={"out_proj": None}, verbose=True)
    printed = capsys.readouterr().out
    rows = [
        [cell for cell in line.replace("│", " ").replace("┃", " ").split("  ") if cell.strip()]
        for line in printed.splitlines()
    ]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert "Model: 8 units" in printed
    assert ["attn.in_proj_weight", "2", "24x8", "384", "1.5"] in rows
    assert ["attn.out_proj", "2", "8x8", "128", "None"] in rows
    assert ["embedding", "1", "80"] in rows
    assert ["output head", "1", "80"] in rows
    assert ("━" in printed) == has_rich


def test_quiet_by_default(capsys):
    grades_param_groups(Model(nn.ModuleList([Block()])), tau=1.0)
    assert capsys.readouterr().out == ""


def test_the_table_of_a_model_that_is_monitored_whole(hf, capsys):
    grades_param_groups(lora_llama(hf), tau=1.0, verbose=True)
    printed = capsys.readouterr().out
    assert "2x16 + 16x2" in printed
    assert "not monitored" not in printed
