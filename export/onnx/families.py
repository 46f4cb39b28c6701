"""The families of decoders that the graph builder knows: one record per ``model_type``, in one table.

A record says how a family differs from Llama: names of modules, norms, residual connections, rotation, windows and
factors. What a config may ask for and a graph cannot have is in :attr:`Family.only`, and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Names:
    """Paths of modules. Those inside a block are relative to the block; the others are whole.

    Attributes:
        embedding: of tokens.
        blocks: the list of blocks.
        norm: before the head.
        head: the matrix of the logits.
        rotary: the module that computes cosine and sine.
        attention: in a block.
        qkv: in the attention: the layers of queries, keys and values, or the one layer of all three.
        output: in the attention: its last layer.
        mlp: in a block; empty where its layers are in the block itself.
        up: in the MLP: its first layers, in a gated one gate and up, or the one layer of both.
        down: in the MLP: its last layer.
    """

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    rotary: str = "model.rotary_emb"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


@dataclass(frozen=True)
class Places:
    """Names of the norms of a block; ``None``: there is no norm."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Norm:
    """A kind of norm.

    Attributes:
        kind: ``rms`` divides by the root mean square; ``layer`` subtracts the mean first.
        epsilon: what is added to the mean square: a field of the config, or a number.
        offset: added to the stored weights.
        weighted: whether there are any.
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: str | float = "rms_norm_eps"
    offset: float = 0.0
    weighted: bool = True


@dataclass(frozen=True)
class HeadNorm:
    """Norms of queries and keys before the rotation, of the family's kind.

    Attributes:
        over: ``head``: over each head, with weights that all heads share; ``each``: over each head, with weights of
            its own; ``width``: over all heads at once.
        query, key: names in the attention.
        when: field of the config that says whether they exist; ``None``: they do.
    """

    over: Literal["head", "each", "width"]
    query: str = "q_norm"
    key: str = "k_norm"
    when: str | None = None


@dataclass(frozen=True)
class Rotation:
    """Rotary position embeddings.

    Attributes:
        interleaved: pairs of neighbours are rotated; else numbers i and i + half of the rotated width.
        neighbours: the model's own table repeats each angle next to itself; else one half repeats the other.
        partial: the field ``partial_rotary_factor`` applies.
        by_type: the field ``rope_parameters`` has one entry per type of block.
        blocks: which blocks rotate: ``all``; ``listed`` in the field ``no_rope_layers``; ``windowed`` ones;
            ``windowed_if_any``: all in a model without windows.
    """

    interleaved: bool = False
    neighbours: bool = False
    partial: bool = False
    by_type: bool = False
    blocks: Literal["all", "listed", "windowed", "windowed_if_any"] = "all"


@dataclass(frozen=True)
class Positions:
    """A learned embedding of positions, added to that of the tokens.

    Attributes:
        path: of its module.
        offset: row of the first position.
    """

    path: str
    offset: int = 0


@dataclass(frozen=True)
class Parallel:
    """Attention and MLP read the same stream, and both outputs are added to it.

    Attributes:
        when: field of the config that says so; ``None``: always.
        one_norm: the MLP reads what the attention reads, and has no norm of its own.
    """

    when: str | None = None
    one_norm: bool = True


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in the place of the MLP. Every expert gets a weight from the scores of the router.

    Attributes:
        experts, chosen, width: fields with the number of experts, how many of them a token gets, and their width.
        normalised: field that says whether the weights of a token's experts are divided by their sum; ``None``: they
            are.
        router: in the module of the MLP: the module with the matrix that gives the scores.
        weights: function of the scores that gives the weights.
        correction: in the module of the router: numbers that are added to the weights for the choice alone.
        scale: field with a factor of the weights.
        path: in the same module: that of the experts.
        shared: in the same module: an expert for all tokens; ``None``: there is none.
        shared_gate: whether ``<shared>_gate`` weighs it.
        shared_width: field with its width.
        shared_count: field that says how many times as wide as an expert it is, in place of ``shared_width``.
        blocks: whether the fields ``decoder_sparse_step`` and ``mlp_only_layers`` say which blocks have one; else all
            have.
        first: field with the number of first blocks that have none.
    """

    experts: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    normalised: str | None = "norm_topk_prob"
    router: str = "gate"
    weights: Literal["softmax", "sigmoid"] = "softmax"
    correction: str | None = None
    scale: str | None = None
    path: str = "experts"
    shared: str | None = None
    shared_gate: bool = True
    shared_width: str = "shared_expert_intermediate_size"
    shared_count: str | None = None
    blocks: bool = False
    first: str | None = None


@dataclass(frozen=True)
class Power:
    """A factor: a field of the config, raised to a power."""

    field: str
    exponent: float = 1.0


@dataclass(frozen=True)
class Same:
    """The value of another field of the config."""

    field: str


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Attributes:
        names: of modules.
        places: of the norms of a block.
        norm: their kind.
        head_norm: of queries and keys.
        parallel: whether attention and MLP are parallel.
        rotation: ``None``: positions are learned.
        positions: the learned ones.
        windows: which blocks have the window of the field ``sliding_window``: ``all``, or those of the type
            ``sliding_attention`` in the field ``layer_types``; ``None``: the family has no windows.
        qkv_by_head: the one layer of queries, keys and values gives all three of a head before the next head.
        transposed: weights of dense layers are stored as (in, out).
        gated: the MLP multiplies by a gate.
        mixture: of experts, in blocks that have one.
        activation: field with the name of its function.
        intermediate: field with its width. Where that is ``None``, the width is four times that of the stream.
        attention_scale: factor on scores; by default 1 / √(width of a head).
        attention_cap: field with the limit c of scores s, c · tanh(s / c); the value ``None`` is no limit.
        embedding_scale: factor on embeddings.
        residual_scale: factor on the outputs of attention and MLP.
        logit_scale: factor on logits.
        logit_cap: field with the limit of logits, like ``attention_cap``.
        only: field → the only value that a graph can have.
    """

    names: Names = Names()
    places: Places = Places()
    norm: Norm = Norm()
    head_norm: HeadNorm | None = None
    parallel: Parallel | None = None
    rotation: Rotation | None = Rotation()
    positions: Positions | None = None
    windows: Literal["all", "by_type"] | None = None
    qkv_by_head: bool = False
    transposed: bool = False
    gated: bool = True
    mixture: Mixture | None = None
    activation: str = "hidden_act"
    intermediate: str = "intermediate_size"
    attention_scale: Power | None = None
    attention_cap: str | None = None
    embedding_scale: Power | None = None
    residual_scale: Power | None = None
    logit_scale: Power | None = None
    logit_cap: str | None = None
    only: Mapping[str, Any] = field(default_factory=dict)


_PACKED = Names(qkv=("qkv_proj",), up=("gate_up_proj",))
_PACKED_GATE = Names(up=("gate_up_proj",))
_PLAIN = Names(up=("up_proj",))
_AFTER = Places(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_AROUND = Places(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_LAYER = Norm("layer", "layer_norm_eps")
_GEMMA = Norm(offset=1.0)
_ROOT = Power("hidden_size", 0.5)
_PARTLY = Rotation(partial=True)
_COHERE = Rotation(interleaved=True, neighbours=True)

_GRANITE = Family(
    embedding_scale=Power("embedding_multiplier"),
    attention_scale=Power("attention_multiplier"),
    residual_scale=Power("residual_multiplier"),
    logit_scale=Power("logits_scaling", -1),
)

FAMILIES: dict[str, Family] = {
    # Llama, and what differs from it little.
    "llama": Family(),
    "mistral": Family(windows="all"),
    "ministral": Family(windows="by_type"),
    "qwen2": Family(windows="by_type"),
    "qwen3": Family(windows="by_type", head_norm=HeadNorm("head")),
    "seed_oss": Family(),
    "ernie4_5": Family(rotation=Rotation(interleaved=True)),
    "helium": Family(rotation=Rotation(interleaved=True)),
    "smollm3": Family(windows="by_type", rotation=Rotation(blocks="listed")),
    "arcee": Family(names=_PLAIN, gated=False),
    "granite": _GRANITE,
    "phi3": Family(names=_PACKED, windows="all", rotation=_PARTLY),
    # Norms elsewhere.
    "gemma": Family(norm=_GEMMA, embedding_scale=_ROOT),
    "gemma2": Family(
        places=_AROUND,
        norm=_GEMMA,
        windows="by_type",
        activation="hidden_activation",
        embedding_scale=_ROOT,
        attention_scale=Power("query_pre_attn_scalar", -0.5),
        attention_cap="attn_logit_softcapping",
        logit_cap="final_logit_softcapping",
    ),
    "gemma3_text": Family(
        places=_AROUND,
        norm=_GEMMA,
        head_norm=HeadNorm("head"),
        windows="by_type",
        rotation=Rotation(by_type=True),
        activation="hidden_activation",
        embedding_scale=_ROOT,
        attention_scale=Power("query_pre_attn_scalar", -0.5),
        logit_cap="final_logit_softcapping",
    ),
    "olmo": Family(norm=Norm("layer", 1e-5, weighted=False), only={"clip_qkv": None}),
    "olmo2": Family(places=_AFTER, head_norm=HeadNorm("width")),
    "olmo3": Family(places=_AFTER, head_norm=HeadNorm("width"), windows="by_type", rotation=Rotation(by_type=True)),
    "exaone4": Family(
        places=_AFTER,
        head_norm=HeadNorm("head"),
        windows="by_type",
        rotation=Rotation(blocks="windowed_if_any"),
    ),
    "glm": Family(names=_PACKED_GATE, rotation=Rotation(interleaved=True, partial=True)),
    "glm4": Family(
        names=_PACKED_GATE,
        places=Places("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
        rotation=Rotation(interleaved=True, partial=True),
    ),
    # Norms that subtract the mean, plain MLPs, parallel blocks.
    "starcoder2": Family(
        names=Names(up=("c_fc",), down="c_proj"), norm=Norm("layer", "norm_epsilon"), windows="all", gated=False
    ),
    "nemotron": Family(names=_PLAIN, norm=Norm("layer", "norm_eps", offset=1.0), rotation=_PARTLY, gated=False),
    "stablelm": Family(
        norm=_LAYER,
        rotation=_PARTLY,
        parallel=Parallel("use_parallel_residual"),
        only={"qk_layernorm": False},
    ),
    "cohere": Family(
        norm=_LAYER,
        head_norm=HeadNorm("each", when="use_qk_norm"),
        parallel=Parallel(),
        rotation=_COHERE,
        logit_scale=Power("logit_scale"),
    ),
    "cohere2": Family(
        norm=_LAYER,
        parallel=Parallel(),
        windows="by_type",
        rotation=Rotation(interleaved=True, neighbours=True, blocks="windowed"),
        logit_scale=Power("logit_scale"),
    ),
    "phi": Family(
        names=Names(norm="model.final_layernorm", output="dense", up=("fc1",), down="fc2"),
        norm=_LAYER,
        head_norm=HeadNorm("head", "q_layernorm", "k_layernorm", when="qk_layernorm"),
        parallel=Parallel(),
        rotation=_PARTLY,
        gated=False,
    ),
    "gpt_neox": Family(
        names=Names(
            embedding="gpt_neox.embed_in",
            blocks="gpt_neox.layers",
            norm="gpt_neox.final_layer_norm",
            head="embed_out",
            rotary="gpt_neox.rotary_emb",
            attention="attention",
            qkv=("query_key_value",),
            output="dense",
            up=("dense_h_to_4h",),
            down="dense_4h_to_h",
        ),
        norm=_LAYER,
        parallel=Parallel("use_parallel_residual", one_norm=False),
        rotation=_PARTLY,
        qkv_by_head=True,
        gated=False,
    ),
    # Mixtures of experts.
    "mixtral": Family(
        windows="all", mixture=Mixture(experts="num_local_experts", width="intermediate_size", normalised=None)
    ),
    "qwen2_moe": Family(windows="by_type", mixture=Mixture(shared="shared_expert", blocks=True)),
    "qwen3_moe": Family(windows="all", head_norm=HeadNorm("head"), mixture=Mixture(blocks=True)),
    "olmoe": Family(head_norm=HeadNorm("width"), mixture=Mixture(width="intermediate_size"), only={"clip_qkv": None}),
    "granitemoe": replace(
        _GRANITE,
        names=Names(mlp="block_sparse_moe"),
        mixture=Mixture(experts="num_local_experts", width="intermediate_size", normalised=None, router="router"),
    ),
    "glm4_moe": Family(
        rotation=_PARTLY,
        head_norm=HeadNorm("head", when="use_qk_norm"),
        mixture=Mixture(
            experts="num_local_experts",
            weights="sigmoid",
            correction="e_score_correction_bias",
            scale="routed_scaling_factor",
            shared="shared_experts",
            shared_gate=False,
            shared_count="n_shared_experts",
            first="first_k_dense_replace",
        ),
        only={"n_group": 1, "topk_group": 1},
    ),
    # Learned positions.
    "gpt2": Family(
        names=Names(
            embedding="transformer.wte",
            blocks="transformer.h",
            norm="transformer.ln_f",
            attention="attn",
            qkv=("c_attn",),
            output="c_proj",
            up=("c_fc",),
            down="c_proj",
        ),
        places=Places(before_attention="ln_1", before_mlp="ln_2"),
        norm=Norm("layer", "layer_norm_epsilon"),
        rotation=None,
        positions=Positions("transformer.wpe"),
        transposed=True,
        gated=False,
        activation="activation_function",
        intermediate="n_inner",
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    "opt": Family(
        names=Names(
            embedding="model.decoder.embed_tokens",
            blocks="model.decoder.layers",
            norm="model.decoder.final_layer_norm",
            output="out_proj",
            mlp="",
            up=("fc1",),
            down="fc2",
        ),
        places=Places(before_attention="self_attn_layer_norm", before_mlp="final_layer_norm"),
        norm=Norm("layer", 1e-5),
        rotation=None,
        positions=Positions("model.decoder.embed_positions", offset=2),
        gated=False,
        activation="activation_function",
        intermediate="ffn_dim",
        only={
            "do_layer_norm_before": True,
            "_remove_final_layer_norm": False,
            "layer_norm_elementwise_affine": True,
            "word_embed_proj_dim": Same("hidden_size"),
        },
    ),
}
