"""Load-balancing loss of the routers of a mixture of experts, over the paths of a sequence.

    loss_g = E * sum_i f_gi * P_gi        f_gi: choices of expert i per token and router, P_gi: its mean probability

That is the loss of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6) for several experts a token,
as transformers has it (`load_balancing_loss_func`): both means are over tokens and routers together, probabilities are
the softmax of the router's logits, and the K choices are their largest. Balanced routers have a loss of K.

A product of means is no sum over tokens, so it matters over which tokens they are taken. Here they are those that a
model reads to predict the trained tokens of one path from root to leaf: a plain conversation without its last token.
However paths are packed, put together (shared prefixes) or taken apart, they are the same, and so is the gradient. A
path counts by the shares of the tokens that are trained in it, as its part of the loss does; what several paths share
is trained in the first (data/prefix_sharing.py).

Tokens are summed by *cell*: tokens in a row that are in the same paths. Sums of cells are added to those of paths.

Legend: T tokens of a sequence, M of a pass, E experts, K chosen for a token, C cells, G paths, N trained tokens.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from preceptor.data.forest import PackedSequence, path_to
from preceptor.errors import ModelError


def balanced_paths(sequence: PackedSequence) -> tuple[np.ndarray, int, dict[str, np.ndarray]]:
    """The paths of a sequence over which the loss is taken: the cell of each token, that of tokens that are in none
    (which is how many there are), and the arrays that `Routing` has of them."""
    ranges: list[list[tuple[int, int]]] = []  # of tokens, of each path
    shares: list[float] = []
    spans = sequence.spans
    parents = {span.parent for span in spans}
    leaves = [place for place in range(len(spans)) if place not in parents]
    trained: set[int] = set()
    for leaf in sorted(leaves, key=lambda place: (spans[place].tree, spans[place].segment)):
        path = path_to(spans, leaf)[::-1]
        targets = [spans[place].targets for place in path if place not in trained]
        trained.update(path)
        if not any(each.start < each.stop for each in targets):
            continue
        end = max(int(sequence.source_N[each].max()) for each in targets if each.start < each.stop) + 1
        shares.append(sum(float(sequence.share_N[each].sum()) for each in targets))
        found = ((spans[place].start, min(spans[place].end, end)) for place in reversed(path))
        ranges.append([(start, stop) for start, stop in found if start < stop])
    bounds = np.unique(np.array([at for each in ranges for pair in each for at in pair], dtype=np.int64))
    num_cells = max(0, len(bounds) - 1)
    cells = [[np.arange(*np.searchsorted(bounds, pair)) for pair in each] for each in ranges]
    cell = np.concatenate([np.arange(0), *(part for each in cells for part in each)])
    path_of = np.repeat(np.arange(len(ranges)), [sum(map(len, each)) for each in cells])
    cell_T = np.searchsorted(bounds, np.arange(sequence.num_tokens), side="right") - 1
    cell_T[~np.isin(cell_T, cell)] = num_cells  # between paths, or behind them
    return cell_T, num_cells, {"cell": cell, "path": path_of, "share_G": np.array(shares, dtype=np.float64)}


@dataclass(eq=False)
class Routing:
    """What the routers made of the tokens of a sequence, in all of its passes.

    cell, path: pairs, each cell of each path. share_G: what the loss of each path counts, before it is divided by the
    step's divisor. probability_sums, choices: of each router so far, by cell, (C + 1, E); the former with a graph.
    """

    num_cells: int
    cell: Tensor
    path: Tensor
    share_G: Tensor
    probability_sums: list[Tensor] = field(default_factory=list)
    choices: list[Tensor] = field(default_factory=list)
    num_chosen: int = 0
    is_closed: bool = False

    def loss(self) -> Tensor:
        """The sum of share_g * loss_g, a scalar with a graph; nothing is recorded after it."""
        self.is_closed = True
        if not self.choices:
            raise ModelError("loss.router_aux_coef: no router of the model ran in its forward pass. Set it to 0")
        chosen_GE, probability_GE = (self._of_paths(each) for each in (self.choices, self.probability_sums))
        rows_G = chosen_GE.sum(-1) / self.num_chosen  # tokens times routers
        products_G = (chosen_GE * probability_GE).sum(-1) * chosen_GE.shape[1] / rows_G**2
        return (self.share_G.to(products_G) * products_G).sum()

    def _of_paths(self, sums: list[Tensor]) -> Tensor:
        summed = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        found = summed.new_zeros(len(self.share_G), summed.shape[1])
        return found.index_add(0, self.path, summed.index_select(0, self.cell))


@dataclass(frozen=True, eq=False, slots=True)
class RoutedTokens:
    """The tokens of one pass. constant_M: which of them have no gradient, where the pass has one; None: none."""

    routing: Routing
    cell_M: Tensor
    constant_M: Tensor | None = None

    def record(self, logits: Tensor, num_chosen: int) -> None:
        """What one router gave for all tokens of the pass, in their order.

        A layer that runs again in backward only computes the same once more.
        """
        num_experts, num_rows = logits.shape[-1], self.routing.num_cells + 1
        logits_ME = logits.reshape(-1, num_experts)
        logits_ME = logits_ME if logits_ME.dtype == torch.float64 else logits_ME.float()
        probability_ME = torch.softmax(logits_ME, dim=-1)
        if self.constant_M is not None:
            probability_ME = torch.where(self.constant_M[:, None], probability_ME.detach(), probability_ME)
        sums = probability_ME.new_zeros(num_rows, num_experts).index_add(0, self.cell_M, probability_ME)
        with torch.no_grad():
            place_MK = self.cell_M[:, None] * num_experts + logits_ME.topk(num_chosen, dim=-1).indices
            ones = sums.new_ones(place_MK.numel())
            counts = sums.new_zeros(num_rows * num_experts).index_add(0, place_MK.flatten(), ones)
        if not self.routing.is_closed:
            self.routing.probability_sums.append(sums)
            self.routing.choices.append(counts.view(num_rows, num_experts))
            self.routing.num_chosen = num_chosen
