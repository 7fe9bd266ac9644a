"""Choosing examples that cover an embedding space. Examples are points of length 1.

    s_ij = max(0, (cos(i, j) - c) / (1 - c))^2 the similarity of two examples. c is the cosine below which a quarter of
                                               all pairs lie: hidden states share much of their direction, and very
                                               different examples must count as 0. (Subtracting the mean would do this
                                               too, but most examples lie near the mean, and it spreads those apart.)
    w_i  = 1 / sum over j of s_ij              the weight of an example: similar examples share one weight, so that ten
                                               times the examples of one kind are not ten times as important

Facility location: choose S, of a given size, to maximise

    f(S) = sum over examples i of w_i * max over j in S of q_j * s_ij             q_j: the quality of example j

which is monotone and submodular, so the greedy choice reaches at least 1 - 1/e = 63 % of the optimum (Nemhauser,
Wolsey and Fisher 1978). It is computed lazily (Minoux 1978): gains only fall as S grows, so most need no update.

k-centre: choose the example that is farthest from all chosen ones, again and again (Gonzalez 1985): the largest
distance of an example to its nearest chosen one is at most twice the optimum. It prefers outliers; facility location
does not.

Cost, for N examples, K chosen, embedding size E. Similarities are computed when needed, in blocks, never N x N:

    N <= EXACT_EXAMPLES     2 N^2 E at the start, then N E for each gain that is updated
    beyond                  N R E ln(1/EPSILON): the examples to cover are a sample of R = max(EXACT_EXAMPLES, K), and
                            each step considers a sample of N/K ln(1/EPSILON) candidates, which costs EPSILON of the
                            optimum in expectation (stochastic greedy, Mirzasoleiman et al. 2015, arXiv:1409.7938)
    k-centre                N K E

Legend: N examples, R examples to cover, C candidates of a block, K chosen examples, E embedding size.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

EXACT_EXAMPLES = 8192
EPSILON = 0.1
UNLIKE_PERCENT = 25

_BLOCK = 1024


class Points:
    """Some examples of an embedding table (float16 or float32, possibly memory-mapped), normalised when read."""

    def __init__(self, table: np.ndarray, places: np.ndarray) -> None:
        self._table, self._places = table, places
        sample = self[np.sort(np.random.default_rng(0).permutation(len(places))[:_BLOCK])]
        cosines = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
        self._floor = min(float(np.percentile(cosines, UNLIKE_PERCENT)), 0.99) if len(cosines) else 0.0

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        """(C, E) float32, each of length 1."""
        point_CE = self._table[self._places[chosen]].astype(np.float32)
        unit_CE: np.ndarray = point_CE / np.maximum(np.linalg.norm(point_CE, axis=1, keepdims=True), 1e-6)
        return unit_CE

    def similarity(self, point_RE: np.ndarray, point_CE: np.ndarray) -> np.ndarray:
        """s of each of R with each of C, (R, C)."""
        similar_RC = point_RE @ point_CE.T
        similar_RC -= self._floor
        similar_RC *= 1 / (1 - self._floor)
        np.clip(similar_RC, 0, 1, out=similar_RC)
        return np.square(similar_RC, out=similar_RC)


class Cover:
    """The examples to cover (all, or beyond EXACT_EXAMPLES a sample), and how well the chosen ones cover them."""

    def __init__(self, points: Points, at_least: int, rng: np.random.Generator) -> None:
        num = len(points)
        self._similarity = points.similarity
        sample = np.sort(rng.permutation(num)[: max(EXACT_EXAMPLES, at_least)])
        self._point_RE = points[sample]
        self._best_R = np.zeros(len(sample), np.float32)
        crowd_R = np.zeros(len(sample))
        for block in _blocks(len(sample)):
            crowd_R += self._similarity(self._point_RE, self._point_RE[block]).sum(axis=1, dtype=np.float64)
        self._weight_R = (1 / crowd_R).astype(np.float32)
        self.scale = num / len(sample)

    def gains(self, candidate_CE: np.ndarray, quality_C: np.ndarray) -> np.ndarray:
        """What each candidate would add to f(S)."""
        more_RC = self._similarity(self._point_RE, candidate_CE) * quality_C.astype(np.float32)
        more_RC -= self._best_R[:, None]
        gain_C: np.ndarray = self._weight_R @ np.maximum(more_RC, 0, out=more_RC)
        return gain_C

    def add(self, point_E: np.ndarray, quality: float) -> None:
        covered_R = self._similarity(self._point_RE, point_E[None])[:, 0] * np.float32(quality)
        self._best_R = np.maximum(self._best_R, covered_R)

    @property
    def share(self) -> float:
        """f(S) over its maximum: 1 if all examples are chosen and their quality is 1."""
        return float(self._weight_R @ self._best_R / self._weight_R.sum())


@dataclass(frozen=True, eq=False, slots=True)
class GreedyChoice:
    """Chosen examples in the order of the choice."""

    index_K: np.ndarray
    gain_K: np.ndarray  # what each added to f(S); for k-centre, its distance before


def facility_location(points: Points, quality_N: np.ndarray, keep: int, seed: int) -> GreedyChoice:
    """The greedy choice of `keep` examples, 1 to N. Ties are broken by an order drawn from `seed`."""
    rng = np.random.default_rng(seed)
    cover = Cover(points, keep, rng)
    order_N = rng.permutation(len(points))
    if len(points) <= EXACT_EXAMPLES:
        return _lazy_greedy(cover, points, quality_N, keep, order_N)
    return _stochastic_greedy(cover, points, quality_N, keep, order_N, rng)


def _lazy_greedy(cover: Cover, points: Points, quality_N: np.ndarray, keep: int, order_N: np.ndarray) -> GreedyChoice:
    rank_N = np.argsort(order_N)
    first_N = np.concatenate([cover.gains(points[block], quality_N[block]) for block in _blocks(len(points))])
    heap = [(-gain, int(rank_N[index]), index, 0) for index, gain in enumerate(first_N.tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < keep:
        negative, rank, index, seen = heapq.heappop(heap)
        here = np.array([index])
        if seen == len(chosen):  # the gain is up to date, and no other can be higher
            cover.add(points[here][0], float(quality_N[index]))
            chosen.append(index)
            gains.append(-negative)
        else:
            gain = float(cover.gains(points[here], quality_N[here])[0])
            heapq.heappush(heap, (-gain, rank, index, len(chosen)))
    return GreedyChoice(np.array(chosen), np.array(gains))


def _stochastic_greedy(
    cover: Cover, points: Points, quality_N: np.ndarray, keep: int, left_N: np.ndarray, rng: np.random.Generator
) -> GreedyChoice:
    """left_N: all examples in any order; the chosen ones are moved to the front."""
    num = len(points)
    num_considered = math.ceil(num / keep * math.log(1 / EPSILON))
    gain_K = np.empty(keep)
    for k in range(keep):
        places = k + rng.choice(num - k, min(num_considered, num - k), replace=False, shuffle=False)
        candidates = left_N[places]
        gain_C = np.concatenate(
            [cover.gains(points[candidates[block]], quality_N[candidates[block]]) for block in _blocks(len(candidates))]
        )
        best = int(gain_C.argmax())
        gain_K[k] = gain_C[best]
        cover.add(points[candidates[best : best + 1]][0], float(quality_N[candidates[best]]))
        left_N[[k, places[best]]] = left_N[[places[best], k]]
    return GreedyChoice(left_N[:keep].copy(), gain_K * cover.scale)


def k_centre(points: Points, quality_N: np.ndarray, keep: int, seed: int) -> GreedyChoice:
    """Farthest first, by (1 - cosine) * quality; starts with the good example nearest to a sample's centre."""
    num = len(points)
    sample = np.sort(np.random.default_rng(seed).permutation(num)[:EXACT_EXAMPLES])
    centre_E = (quality_N[sample, None] * points[sample]).mean(axis=0)
    index = int((np.concatenate([points[block] @ centre_E for block in _blocks(num)]) * quality_N).argmax())
    distance_N = np.full(num, 2.0, np.float32)
    chosen, gains = [], []
    while True:
        chosen.append(index)
        gains.append(float(distance_N[index]))
        if len(chosen) == keep:
            return GreedyChoice(np.array(chosen), np.array(gains))
        point_E = points[np.array([index])][0]
        for block in _blocks(num):
            distance_N[block] = np.minimum(distance_N[block], np.maximum(1 - points[block] @ point_E, 0))
        distance_N[index] = -1.0  # chosen: not again, even among equals
        index = int(np.where(distance_N >= 0, distance_N * quality_N, -1.0).argmax())


def _blocks(num: int) -> list[np.ndarray]:
    return [np.arange(start, min(num, start + _BLOCK)) for start in range(0, num, _BLOCK)]


def nearest_chosen(points: Points, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each example, the place in `chosen` of the most similar one, and the similarity."""
    num = len(points)
    nearest_N, similarity_N = np.zeros(num, np.int64), np.full(num, -1, np.float32)
    for start in range(0, len(chosen), EXACT_EXAMPLES):
        chosen_KE = points[chosen[start : start + EXACT_EXAMPLES]]
        for block in _blocks(num):
            similar_CK = points.similarity(points[block], chosen_KE)
            best_C = similar_CK.max(axis=1)
            better = best_C > similarity_N[block]
            nearest_N[block[better]] = start + similar_CK.argmax(axis=1)[better]
            similarity_N[block[better]] = best_C[better]
    return nearest_N, similarity_N


def coverage(points: Points, chosen: np.ndarray, seed: int) -> float:
    """f(S) over its maximum for examples of quality 1: how much of the space the chosen examples cover."""
    cover = Cover(points, 1, np.random.default_rng(seed))
    for index in chosen.tolist():
        cover.add(points[np.array([index])][0], 1.0)
    return cover.share
