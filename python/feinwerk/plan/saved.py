"""What autograd keeps from the forward for the backward, tensor by tensor.

A layer is walked as transformers' forward walks it. Every operation names the tensors that it
saves; a name is a storage, so that what two operations save is counted once:

```
   hidden ──> norm ──> q, k, v ──> rotate ──> attention ──> o ──┐
     └───────────────────────────────────────────────────────── + ──> mid
   mid ──> norm ──> gate, up ──> silu ──> product ──> down ──┐
     └────────────────────────────────────────────────────── + ──> hidden of the next layer
```
A Linear keeps its x where an adapter or the weight is trained; docs/ops/lora_linear.md lists what
an adapter keeps. Nothing is kept of what needs no gradient, as in the first layer in front of its
first adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from feinwerk.plan.architecture import Architecture, Linear
from feinwerk.plan.settings import Settings

FP32, INT64 = 4, 8


@dataclass
class Walk:
    """The tensors that one part of the model saves, by name.

    Attributes:
        model: the sizes.
        settings: how it is trained.
        kept: bytes by name, in the order of the forward.
        before_mlp: bytes of those that are saved in front of the second norm.
    """

    model: Architecture
    settings: Settings
    kept: dict[str, int] = field(default_factory=dict)
    before_mlp: int = 0

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.kept.values())

    def keep(self, name: str, rows: int, width: int, size: int | None = None) -> None:
        """Note a tensor of rows x width elements, by default in the dtype of activations."""
        self.kept[name] = rows * width * (self.settings.size if size is None else size)

    def norm(self, name: str, x: str, rows: int, width: int, needs: bool) -> bool:
        """Walk an RMSNorm; `x` names its input. Return whether its output needs a gradient."""
        trained = not self.settings.adapted
        if needs or trained:
            # In bf16 it computes on an fp32 copy of x.
            wide = x if self.settings.size == FP32 else f"{name}.wide"
            self.keep(wide, rows, width, FP32)
            self.keep(f"{name}.rsqrt", rows, 1, FP32)
        if trained:
            self.keep(f"{name}.normalized", rows, width)
        return needs or trained

    def linear(self, linear: Linear, x: str, needs: bool) -> bool:
        """Walk a Linear; `x` names its input, `<name>.y` is its output."""
        settings, M, name = self.settings, self.settings.tokens, linear.name
        if not settings.adapted:
            self.keep(x, M, linear.K)
            return True
        if name not in settings.targeted(self.model):
            return needs
        self.keep(x, M, linear.K)
        self.keep(f"{name}.S", M, settings.r, FP32)
        self.keep(f"{name}.scaling", 1, 1, FP32)
        if settings.dropout > 0:
            self.keep(f"{name}.seed", 1, 1, INT64)
        if settings.dora:
            self.keep(f"{name}.norms", 1, linear.N, FP32)
            if settings.dropout == 0:
                self.keep(f"{name}.y", M, linear.N)
        return True

    def attention(self, needs: bool) -> None:
        """Walk the attention over rotated queries and keys."""
        settings, model = self.settings, self.model
        M, T = settings.tokens, settings.seq
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        if not needs:
            return
        v, v_width = "v_proj.y", kv
        if model.model_type == "phi3":  # v is a view of what qkv_proj returns
            v, v_width = "qkv_proj.y", q + 2 * kv
        self.keep("q.rotated", M, q)
        if settings.attention == "sdpa":
            self.keep("k.rotated", M, kv)
            self.keep(v, M, v_width)
            # Its result has the layout of q. Phi-3 puts q together anew, with heads before tokens.
            phi3_on_cpu = model.model_type == "phi3" and settings.device == "cpu"
            self.keep("attention.by_heads" if phi3_on_cpu else "attention.out", M, q)
            self.keep("attention.logsumexp", M, model.heads, FP32)
            return
        repeated = model.heads > model.kv_heads
        self.keep("k.repeated" if repeated else "k.rotated", M, q)
        if repeated or settings.batch > 1:  # as [batch * heads, seq, head_dim] it is a copy
            v, v_width = "v.by_heads", q
        self.keep(v, M, v_width)
        scores = settings.batch * model.heads * T
        self.keep("attention.probabilities", scores, T, FP32)
        if settings.size != FP32:
            self.keep("attention.weights", scores, T)

    def mlp(self, needs: bool) -> None:
        """Walk the gated MLP behind the second norm."""
        model, M, inner = self.model, self.settings.tokens, self.model.intermediate_size
        x = "post_attention_layernorm.out"
        if model.model_type == "phi3":
            gate = up = self.linear(model.linear("gate_up_proj"), x, needs)
            outputs = {"gate_up_proj.y": 2 * inner}
        else:
            gate = self.linear(model.linear("gate_proj"), x, needs)
            up = self.linear(model.linear("up_proj"), x, needs)
            outputs = {"gate_proj.y": inner, "up_proj.y": inner}
        if gate:  # silu saves the one, the product the other
            for name, width in outputs.items():
                self.keep(name, M, width)
        if up:
            self.keep("silu", M, inner)
        self.linear(model.linear("down_proj"), "product", gate or up)


def layer(model: Architecture, settings: Settings, *, first: bool) -> Walk:
    """Return what one decoder layer saves.

    Args:
        model: its sizes.
        settings: how it is trained.
        first: whether it is the first one, whose input needs no gradient beside adapters.
    """
    walk = Walk(model, settings)
    M, H = settings.tokens, model.hidden_size
    needs = not (first and settings.adapted)
    needs_hidden = needs
    needs = walk.norm("input_layernorm", "hidden", M, H, needs)
    heads = {"q": model.heads, "k": model.kv_heads}
    if model.model_type == "phi3":
        rotated = attended = walk.linear(model.linear("qkv_proj"), "input_layernorm.out", needs)
    else:
        x = "input_layernorm.out"
        found = {n: walk.linear(model.linear(f"{n}_proj"), x, needs) for n in ("q", "k", "v")}
        if model.qk_norm:
            for n, count in heads.items():
                found[n] = walk.norm(
                    f"{n}_norm", f"{n}_proj.y", M * count, model.head_dim, found[n]
                )
        rotated, attended = found["q"] or found["k"], any(found.values())
    if rotated:
        walk.keep("rotary", 2 * settings.seq, model.rotary_dim)  # cos and sin
    walk.attention(attended)
    needs = walk.linear(model.linear("o_proj"), "attention.out", attended) or needs_hidden
    walk.before_mlp = walk.total
    needs = walk.norm("post_attention_layernorm", "mid", M, H, needs)
    walk.mlp(needs)
    return walk


def head(model: Architecture, settings: Settings) -> Walk:
    """Return what stands behind the last layer: the norm, the head and the loss over all tokens."""
    walk = Walk(model, settings)
    M, H = settings.tokens, model.hidden_size
    walk.norm("norm", "hidden", M, H, needs=True)
    if not settings.adapted:
        walk.keep("norm.out", M, H)  # x of the head
        walk.keep("tokens", M, 1, INT64)  # for the gradient of the embedding
    walk.keep("log_softmax", M, model.vocab_size, FP32)
    # Shifted by one; of a single row, a view that begins one later.
    walk.keep("labels", M + (settings.batch == 1), 1, INT64)
    walk.keep("loss.total_weight", 1, 1, FP32)
    return walk
