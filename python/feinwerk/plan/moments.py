"""The moments at which a step needs most memory: in the loss, in the backward, in the step.

```
   activations  ▁▂▃▄▅▆▇█▇▆▅▄▃▂▁        saved in the forward, freed layer by layer in the backward
   loss                ▅█▂              over the whole vocabulary
   gradients             ▁▂▃▄▅▆▇██     as the backward goes on, until the step
```
"""

from __future__ import annotations

from dataclasses import dataclass

from feinwerk.plan import resident, saved
from feinwerk.plan.architecture import Architecture
from feinwerk.plan.resident import Transfers
from feinwerk.plan.saved import FP32
from feinwerk.plan.settings import Settings
from feinwerk.plan.workspace import Workspace


@dataclass(frozen=True)
class Moment:
    """What is there at a moment of the step, in bytes, beside what is always there.

    Attributes:
        name: of the moment.
        activations: what the layers have saved.
        loss: what the head and the loss have saved and work with.
        gradients: of parameters.
        temporaries: gradients of activations, and gradients that are still to be added up.
        gathered: weights that are whole with stage 3.
        sent: gradients that stage 3 is reducing.
        workspace: of kernels that is not kept.
    """

    name: str
    activations: int = 0
    loss: int = 0
    gradients: int = 0
    temporaries: int = 0
    gathered: int = 0
    sent: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        kept = self.activations + self.loss + self.gradients
        return kept + self.temporaries + self.gathered + self.sent + self.workspace


@dataclass(frozen=True)
class Activations:
    """What layers keep for their backward, in bytes.

    Attributes:
        kept: of all layers when the forward has ended.
        recomputed: with checkpointing, what a layer has beside that when its backward begins.
        first: of the first layer alone, when its backward begins.
        temporaries: gradients of activations within a layer's backward, at their most.
    """

    kept: int
    recomputed: int
    first: int
    temporaries: int


def activations(model: Architecture, settings: Settings) -> Activations:
    """Return what the layers keep."""
    first, later = (saved.layer(model, settings, first=flag) for flag in (True, False))
    count = model.layers - 1
    last = later if count else first
    working = temporaries(last)
    if settings.checkpointing:
        hidden = settings.tokens * model.hidden_size * settings.size
        return Activations(model.layers * hidden, last.total, hidden + first.total, working)
    # cos and sin are the same tensors in all layers.
    shared = later.kept.get("rotary", 0) * (count - (0 if "rotary" in first.kept else 1))
    total = first.total + count * later.total - (shared if count else 0)
    return Activations(total, 0, first.total, working)


def temporaries(layer: saved.Walk) -> int:
    """Bytes beside what a layer has saved, while its backward runs, at their most.

    In the MLP, gradients of the product and its two factors, while what down_proj saved is gone. In
    eager attention, gradients of scores and probabilities, while what the MLP saved is gone.
    """
    model, settings = layer.model, layer.settings
    M, D = settings.tokens, settings.size
    stream = M * model.hidden_size * D
    mlp = 3 * M * model.intermediate_size * D - layer.kept.get("product", 0)
    if not settings.adapted:  # its weight's gradient has come first
        down = model.linear("down_proj")
        mlp += down.N * down.K * D
    attention = 0
    if settings.attention == "eager":
        scores = settings.batch * model.heads * settings.seq**2
        attention = 2 * scores * FP32 - layer.kept.get("attention.weights", 0)
    return stream + max(mlp, layer.before_mlp + attention - layer.total)


def moments(
    model: Architecture, settings: Settings, transfers: Transfers, workspace: Workspace
) -> list[Moment]:
    """Return the moments among which the peak is."""
    kept = activations(model, settings)
    behind, logits = saved.head(model, settings), settings.tokens * model.vocab_size
    sizes = resident.gradient_sizes(model, settings)
    before = sizes.total if settings.accumulate else 0
    # Of log_softmax' backward: the gradient it gets and the one it returns, beside what it saved.
    loss = behind.total + 2 * logits * FP32
    # A tied table gets two gradients: the head's waits for the embedding's, and they are added
    # into a third tensor, which becomes the table's where there is none yet.
    tied = model.tied and not settings.adapted
    table = model.vocab_size * model.hidden_size * settings.size if tied else 0
    becomes = table if settings.stage < 2 and not settings.accumulate else 0
    root, whole = transfers.root, transfers.root + 3 * transfers.layer
    return [
        Moment(
            "forward of the last layer", kept.kept, gradients=before, gathered=whole,
            workspace=workspace.layer,
        ),
        Moment("loss", kept.kept, loss, before, gathered=root),
        Moment(
            "backward of the last layer", kept.kept + kept.recomputed,
            gradients=max(before, sizes.head), temporaries=table + kept.temporaries,
            gathered=whole, workspace=workspace.layer,
        ),
        Moment(
            "backward of the first layer", kept.first,
            gradients=max(before, sizes.total - sizes.layer - sizes.embedding),
            temporaries=table + kept.temporaries, sent=transfers.reduced, workspace=workspace.layer,
            gathered=root + 2 * transfers.layer,  # none comes in any more
        ),
        Moment(
            "gradient of the embedding", gradients=sizes.total, temporaries=3 * table - becomes,
            gathered=root, sent=transfers.reduced_root,
        ),
        Moment("optimizer step", gradients=sizes.total, workspace=workspace.step),
    ]  # fmt: skip
