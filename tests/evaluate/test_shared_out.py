"""An evaluation that several processes share out gives the figures and answers of one."""

import numpy as np
import pytest
from ranks import run_ranks

from preceptor.evaluate.generate import generate
from preceptor.evaluate.likelihood import segment_losses
from preceptor.evaluate.model import EvaluatedModel
from preceptor.model.forward import Engine
from preceptor.model.sharding import device_mesh, shard_model
from preceptor.world import ONE
from tiny import branching, chain, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork")


class Chat:
    tokenizer = tiny_tokenizer()
    stop_token_ids = (3, 4, 5, 6, 7)


def evaluated(world=ONE, strategy=None):
    model = tiny_model("llama", vocab_size=300)
    if strategy is not None:
        shard_model(Engine(model), device_mesh(strategy, "cpu", world.size, world.size))
    return EvaluatedModel("tiny", model, Chat(), world=world)


def measured(own):
    rng = np.random.default_rng(0)
    trees = [chain(rng, (4 + n, 3 + 5 * n)) for n in range(5)] + [branching(rng)]
    losses = segment_losses(own.model, trees, 40, False, own.world)
    contexts = [[20 + n] * (3 + n) for n in range(5)]
    answers = own.generate(contexts, 12, batch_size=2, shared_out=True)
    few = own.generate(contexts[:1], 4, shared_out=True)  # fewer than there are processes
    everywhere = own.generate(contexts[:2], 4)
    nats = [[segment.nats for segment in tree] for tree in losses]
    return [round(nat, 4) for tree in nats for nat in tree], [answer.ids for answer in (*answers, *few, *everywhere)]


@pytest.mark.parametrize(("num", "strategy"), [(3, "replicate"), (2, "shard")])
def test_each_process_has_the_figures_and_answers_of_one(num, strategy):
    expected = measured(evaluated())
    assert len({len(ids) for ids in expected[1]}) > 1, "some answers stop early"
    for found in run_ranks(num, lambda world: measured(evaluated(world, strategy))):
        assert not isinstance(found, BaseException), found.__notes__
        assert found == expected


def test_each_process_reads_a_part():
    def work(world):
        calls = []
        own = evaluated(world)
        forward = own.model.forward
        own.model.forward = lambda *args, **named: calls.append(len(named["input_ids"])) or forward(*args, **named)
        generate(own.model, Chat.tokenizer, [], (), 1)
        own.generate([[9, 9]] * 6, 1, shared_out=True)
        return calls

    assert run_ranks(2, work) == [[3], [3]]
