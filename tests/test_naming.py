"""Names: which tensors are units, the names of units, and their layers and kinds.

`unit_of` decides by name and shape alone. Names that are clearly those of an embedding, an output
head, a norm, a bias or a router are excluded, every other matrix is monitored; words count as whole
words only, and the prefixes of wrappers change nothing.
"""

import pytest
import torch

from grades_kernels.freezing import naming
from grades_kernels.freezing.naming import canonical_name, is_lora_factor, layer_and_kind, unit_of

MATRIX = (24, 16)

WRAPPED = """
    layers.0.fc.weight module.layers.0.fc.weight module.module.layers.0.fc.weight
    _orig_mod.layers.0.fc.weight layers.0._orig_mod.fc.weight
    _orig_mod.module.layers.0.fc.weight module._orig_mod.layers.0.fc.weight
    layers.0._checkpoint_wrapped_module.fc.weight
    _fsdp_wrapped_module.layers.0._fsdp_wrapped_module.fc.weight
    _fsdp_wrapped_module.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.fc.weight
    base_model.model.layers.0.fc.weight module.base_model.model.layers.0.fc.weight
    _forward_module.layers.0.fc.weight _forward_module.module._orig_mod.layers.0.fc.weight
    _orig_mod.base_model.model.layers.0.fc.weight base_model.model._orig_mod.layers.0.fc.weight
"""


@pytest.mark.parametrize("name", WRAPPED.split())
def test_prefixes_of_wrappers_are_removed(name):
    assert canonical_name(name) == "layers.0.fc.weight"
    assert unit_of(name, MATRIX, torch.float32) == "layers.0.fc.weight"


OWN_NAMES = """
    module a decoder.module.fc.weight model.base_model.fc.weight my_module.fc.weight
    model.layers.0.self_attn.q_proj.base_layer.weight
"""


@pytest.mark.parametrize("name", OWN_NAMES.split())
def test_components_of_the_model_itself_stay(name):
    assert canonical_name(name) == name


NAMES = {
    None: """
        a weight 0.weight fc1.weight fc.weight fc.0.weight 0.fc.weight w1 encoder.weight
        net.2.weight out.weight layers.0.rel_pos_proj.weight layers.0.bias_mlp.0.weight
        layers.0.tables layers.0.log_a_proj.weight layers.0.attention_biases_proj.weight
        layers.0.fc1.parametrizations.weight.original layers.0.fc1.weight_v layers.0.weight_gate
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
        0.attn.output.weight 0.mlp.0.weight 0.model.encoder.layer.1.output.dense.weight
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
        0.model.shared.weight 0.auto_model.shared.weight item_table.weight
        layers.0.attn.rel_pos_h layers.0.attn.rel_pos_w tok.lora_embedding_A.default
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
        0.cls.predictions.transform.dense.weight 0.model.pooler.dense.weight
        0.lm_head.dense.weight model.0.model.pooler.dense.weight
        lm_head.parametrizations.weight.original1
        """,
    "norm": """
        ln_f.weight ln_1.weight norm.weight q_norm.weight norm_f.weight norms.0.weight
        LayerNorm.weight RMSNorm.weight layers.0.input_layernorm.weight blocks.0.norm1.weight
        """,
    "bias": """
        bias fc.bias layers.0.SelfAttention.relative_attention_bias.weight in_proj_bias
        layers.0.relative_position_bias_table layers.0.mlp.experts.gate_up_proj_bias
        layers.0.self_attn.bias_u layers.0.self_attn.pos_bias_v layers.0.attn.attention_biases
        """,
    "vector": """
        blocks.0.scale_shift_table scale_shift_table layers.0.mixer.A_log
        layers.0.fc1.parametrizations.weight.original0 layers.0.fc1.weight_g
        """,
    "router": """
        layers.0.mlp.router.weight layers.0.mlp.router.classifier.weight
        layers.0.mlp.router_mlp.fc1.weight layers.0.router_gate.proj.weight
        layers.0.mlp.shared_expert_gate.weight
        """,
}
"""The reason why matrices of these names are excluded; None for monitored ones."""

MONITORED = NAMES[None].split()
UNMONITORED = [(why, name) for why, names in NAMES.items() if why for name in names.split()]


@pytest.mark.parametrize("name", MONITORED)
def test_a_matrix_is_monitored_unless_its_name_excludes_it(name):
    assert unit_of(name, MATRIX, torch.float32) == name


@pytest.mark.parametrize(("reason", "name"), UNMONITORED)
def test_names_that_exclude_a_matrix(reason, name):
    assert unit_of(name, MATRIX, torch.float32) is None
    assert naming.exclusion_reason(name, MATRIX, torch.float32) == reason
    assert naming.is_embedding(name, torch.empty(MATRIX)) == (reason == "embedding")


def test_the_name_tables_notice_substring_rules():
    """Negative control: the obvious rule, "the name contains a word", fails both tables."""
    words = ("embed", "head", "norm", "bias", "wte", "score")

    def by_substring(name):
        return not any(word in name for word in words)

    assert not all(by_substring(name) for name in MONITORED)
    assert any(by_substring(name) for _, name in UNMONITORED)


@pytest.mark.parametrize(
    "shape", [(24, 16), (1, 16), (16, 1), (1, 1), (4, 24, 16), (8, 3, 3, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_floating_tensors_of_two_dimensions_are_monitored(shape, dtype):
    assert unit_of("layers.0.fc.weight", shape, dtype) == "layers.0.fc.weight"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in [(), (16,), (1, 1, 16), (1, 16, 1, 1), (0, 16), (16, 0)]]
    + [(MATRIX, dtype) for dtype in [torch.complex64, torch.int8, torch.uint8, torch.bool]],
    ids=str,
)
def test_vectors_empty_and_non_floating_tensors_are_excluded(shape, dtype):
    assert unit_of("layers.0.fc.weight", shape, dtype) is None


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
    ("factors", "adapter"),
    [
        ("q_proj.lora_A.default.weight q_proj.lora_B.default.weight", ".default"),
        ("q_proj.lora_A.other.weight q_proj.lora_B.other.weight", ".other"),
        ("q_proj.lora_A q_proj.lora_B", ""),
        ("q_proj.lora_a.weight q_proj.lora_b.weight", ""),
        ("q_proj.lora_A.default q_proj.lora_B.default q_proj.lora_E.default", ".default"),
    ],
    ids=["peft", "adapter-other", "bare-parameters", "lower-case", "adalora"],
)
def test_lora_factors_are_one_unit(factors, adapter):
    """The prefix of a wrapper before one of the factors does not separate them."""
    first, *others = (f"m.0.{factor}" for factor in factors.split())
    names = [first, *(f"module.{name}" for name in others)]
    assert all(is_lora_factor(name) for name in names)
    assert {unit_of(name, (2, 16), torch.float32) for name in names} == {
        f"m.0.q_proj.lora{adapter}"
    }
    assert not is_lora_factor("m.0.q_proj.base_layer.weight")


UNET = "attentions.0.transformer_blocks.2"


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (3, "q_proj")),
        ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", (2, "kv_a_proj_with_mqa")),
        ("transformer.h.0.attn.c_attn.weight", (0, "attn.c_attn")),
        ("transformer.h.0.attn.c_proj.weight", (0, "attn.c_proj")),
        ("transformer.h.0.mlp.c_proj.weight", (0, "mlp.c_proj")),
        ("bert.encoder.layer.1.attention.output.dense.weight", (1, "attention.output.dense")),
        ("bert.encoder.layer.1.output.dense.weight", (1, "output.dense")),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", (1, "SelfAttention.q")),
        ("decoder.block.1.layer.0.SelfAttention.q.weight", (1, "decoder.SelfAttention.q")),
        ("decoder.block.1.layer.1.EncDecAttention.q.weight", (1, "decoder.EncDecAttention.q")),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", (0, "vision.q_proj")),
        ("model.visual.blocks.0.attn.qkv.weight", (0, "vision.qkv")),
        ("model.layers.0.block_sparse_moe.experts.5.w1.weight", (0, "experts.w1")),
        ("model.layers.0.mlp.experts.gate_up_proj", (0, "experts.gate_up_proj")),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (0, "shared_expert.up_proj")),
        ("model.layers.4.self_attn.q_proj.lora.default", (4, "q_proj.lora")),
        ("model.layers.4.self_attn.q_proj.lora", (4, "q_proj.lora")),
        ("model.layers.4.self_attn.q_proj.base_layer.weight", (4, "q_proj")),
        ("model.layers.4.mlp.down_proj.modules_to_save.other.weight", (4, "down_proj")),
        ("blocks.0.mlp.0.weight", (0, "mlp.0")),
        ("encoder.layers.encoder_layer_3.mlp.0.weight", (3, "mlp.0")),
        ("layer2.0.fc.weight", (2, "fc")),
        ("0.model.encoder.layer.3.attention.self.query.weight", (3, "attention.self.query")),
        ("model.0.auto_model.layers.3.self_attn.q_proj.lora.default", (3, "q_proj.lora")),
        ("0.encoder.layers.encoder_layer_3.mlp.0.weight", (3, "mlp.0")),
        ("0.mlp.0.weight", (0, "mlp.0")),
        ("1.attn.in_proj_weight", (1, "attn.in_proj_weight")),
        ("1.experts.5.w1.weight", (1, "experts.w1")),
        ("swin.encoder.layers.2.blocks.5.attention.q_proj.weight", (2, "q_proj")),
        ("stages.2.blocks.1.attn_grid.attn.qkv.weight", (2, "attn_grid.attn.qkv")),
        ("features.5.3.mlp.0.weight", (5, "mlp.0")),
        ("blocks.0.mlp.layers.1.weight", (0, "mlp.layers.1")),
        ("layers.0.layers.1.weight", (0, "layers.1")),
        ("layers.0.blocks.1.lora.default", (0, "blocks.1.lora")),
        (f"down_blocks.1.{UNET}.attn1.to_out.0.weight", (1, "attn1.to_out.0")),
        (f"up_blocks.1.{UNET}.ff.net.0.proj.weight", (1, "decoder.ff.net.0.proj")),
        ("mid_block.resnets.1.time_emb_proj.weight", (1, "time_emb_proj")),
        ("layers.2.mlp.fc1.parametrizations.weight.original1", (2, "fc1")),
        ("layers.2.attn.q_proj.weight_v", (2, "q_proj")),
        ("layers.2.mlp.0.weight_orig", (2, "mlp.0")),
        ("0.weight", (0, "weight")),
        ("net.2.weight", (2, "net")),
        ("fc1.weight", (None, "fc1")),
        ("weight", (None, "weight")),
        ("lora", (None, "lora")),
        ("group0.param3", (None, "group0")),
    ],
)
def test_layer_and_kind(unit, expected):
    assert layer_and_kind(unit) == expected


@pytest.mark.parametrize(
    ("unit", "stack"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers"),
        ("0.model.layers.3.mlp.up_proj.weight", "0.model.layers"),
        ("1.mlp.0.weight", ""),
        ("fc1.weight", "fc1.weight"),
    ],
)
def test_stack_of(unit, stack):
    assert naming.stack_of(unit) == stack


def test_both_factors_of_an_adapter_on_a_gate_are_one_unit():
    """The rank makes one narrow and the other wide, which says nothing about a router."""
    names = [f"model.layers.0.mlp.gate.lora_{x}.default.weight" for x in "AB"]
    units = {
        unit_of(name, shape, torch.float32)
        for name, shape in zip(names, [(2, 16), (4, 2)], strict=True)
    }
    assert units == {"model.layers.0.mlp.gate.lora.default"}


EXCLUDED_ADAPTERS = """
    model.embed_tokens.token_adapter.trainable_tokens_delta.default led.shared.weight
    model.embed_tokens.trainable_tokens_delta.default weight_hh_l0_g in_proj_weight_g
"""


@pytest.mark.parametrize("name", EXCLUDED_ADAPTERS.split())
def test_rows_of_embeddings_shared_tables_and_magnitudes_are_no_units(name):
    assert unit_of(name, MATRIX, torch.float32) is None
