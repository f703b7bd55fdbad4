"""The loss and the scores of a fine-tuning task, the small model, and the splits of its data."""

from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eggroll.envs.tasks.records import read_records
from eggroll.experiments.zo.baseline import Backprop
from eggroll.experiments.zo.config import Config
from eggroll.experiments.zo.data.examples import Examples, encode
from eggroll.experiments.zo.data.tasks import Classification, Generation
from eggroll.experiments.zo.evolution import Evolution
from eggroll.experiments.zo.inputs import read_splits
from eggroll.experiments.zo.problem import FineTuning, score
from eggroll.experiments.zo.warm_start import Text, WarmStart, init, train
from eggroll.llm.decoder import Decoder, apply, token_log_likelihood
from eggroll.llm.models import transformer
from eggroll.llm.tokenizers import ByteTokenizer
from eggroll.zo.blocks import Blocks, whole_loss
from tests.experiments.zo.test_zo_experiment import write

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax.adam relies on it
SHORT = Classification("{text}:", {"0": "-", "1": "++"})


@pytest.mark.parametrize("task", [SHORT, Generation("{text}", "={label}!")], ids=["classification", "generation"])
def test_loss_and_accuracy_are_those_of_whole_logits(task, tmp_path):
    """Logits at some positions give what logits at all of them give; pieces give what the judge gives."""
    records = read_records(write(tmp_path / "data", all=7) / "all.jsonl")
    examples = encode(records, task, ByteTokenizer(), max_length=20)
    config = WarmStart(layers=1, width=16).model
    decoder, params = transformer.make_decoder(config), init(WarmStart(layers=1, width=16))
    params["resident"]["embed"] *= 30  # so that the answers differ
    tuning = FineTuning(decoder, examples, examples, examples)

    @jax.jit
    def ways(params):
        flat = (array.reshape(-1, array.shape[-1]) for array in (examples.tokens, examples.mask))
        logits = apply(decoder, params, *flat).reshape(*examples.tokens.shape, -1)
        scores = token_log_likelihood(logits, examples.tokens, examples.targets).sum(axis=-1)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), examples.labels[:, None], axis=1)
        loss = -chosen.mean() if isinstance(task, Classification) else -scores.sum() / examples.targets.sum()
        plain = loss, jnp.mean(scores.argmax(axis=1) == examples.labels)
        pieces = [whole_loss(tuning.pieces(objective))(params, examples, None) for objective in ("loss", "accuracy")]
        return plain, pieces, tuning.judge()(params, examples)

    plain, ((loss, weight), (wrong, count)), judged = jax.device_get(ways(params))
    assert judged[0] == pytest.approx(plain[0], rel=1e-5) and loss / weight == pytest.approx(plain[0], rel=1e-5)
    assert judged[1] == pytest.approx(1 - wrong / count) and count == 7
    if isinstance(task, Classification):
        assert judged[1] == pytest.approx(plain[1]) and 0 < plain[1] < 1


def test_a_generated_answer_is_right_when_every_token_is_the_likeliest():
    tokens, targets = np.array([[[1, 2, 3]], [[1, 2, 2]]], np.int32), np.array([[[False, True, True]]] * 2)
    examples = Examples(tokens, np.ones((2, 1, 3), bool), targets, np.zeros(2, np.int32))
    decoder = Decoder(
        lambda resident, tokens, mask: (jax.nn.one_hot(tokens, 4), ()),
        lambda own, x, aux: x,
        lambda resident, x: x @ resident["next"],  # the likeliest word after n is n + 1
    )
    params = {"resident": {"next": jnp.roll(jnp.eye(4), 1, axis=1)}, "blocks": {"none": jnp.zeros((1, 1))}}
    judge = FineTuning(decoder, examples, examples, examples).judge()
    assert score(lambda batch: judge(params, batch), examples).accuracy == 0.5


def test_an_answer_whose_score_is_not_a_number_is_not_right_and_has_no_accuracy_to_improve():
    tokens, targets = np.array([[[1, 2], [1, 3]]] * 2, np.int32), np.array([[[False, True]] * 2] * 2)
    examples = Examples(tokens, np.ones((2, 2, 2), bool), targets, np.zeros(2, np.int32))
    decoder = Decoder(
        lambda resident, tokens, mask: (jax.nn.one_hot(tokens, 4), ()),
        lambda own, x, aux: x,
        lambda resident, x: x @ resident["next"],
    )
    tuning = FineTuning(decoder, examples, examples, examples)
    for scale, accuracy in ((1.0, 1.0), (jnp.nan, 0.0)):
        params = {"resident": {"next": scale * jnp.roll(jnp.eye(4), 1, axis=1)}, "blocks": {"none": jnp.zeros((1, 1))}}
        assert float(tuning.judge()(params, examples)[1]) == accuracy
        judged, count = whole_loss(tuning.pieces("accuracy", judged=True))(params, examples, None)
        assert 1 - judged / count == accuracy  # offloaded
        wrong, count = whole_loss(tuning.pieces("accuracy"))(params, examples, None)
        assert wrong / count == 0 if accuracy else jnp.isnan(wrong / count)


def test_blocks_are_scored_on_devices_that_share_a_batch_of_any_size():
    """9 examples on 2 devices: each twice, which leaves the means as they are."""
    runs, examples = Evolution.__new__(Evolution), Examples(*[np.arange(9)] * 4)
    runs._recipe, seen = SimpleNamespace(mesh=SimpleNamespace(shape={"data": 2})), []

    def loss(state, batch, key):
        seen.append(len(batch.labels))
        return batch.labels.mean()

    runs._judges = [SimpleNamespace(loss=loss)] * 2
    assert runs._judge_by_block(SimpleNamespace(key=None), examples) == (4.0, -3.0) and seen == [18, 18]


def test_scores_weigh_parts_by_what_is_in_them():
    """250 examples in parts of 100, 100 and 50; of generation, by their tokens."""
    targets = np.zeros((250, 1, 4), bool)
    targets[:, :, 2:], targets[200:, :, 1] = True, True
    examples = Examples(np.zeros((250, 1, 4), np.int32), targets, targets, np.arange(250))
    judged = lambda batch: (float(batch.labels[0]), float(batch.labels[0] == 0))  # noqa: E731
    assert score(judged, examples) == ((100 * 200 + 200 * 150) / 550, 100 / 250)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backprop_adds_up_steps_below_the_spacing_of_the_parameters(dtype):
    """Steps of 1e-3 from 1 are lost one by one in bfloat16; the loss sees the parameters in the model's dtype."""
    seen = set()

    def end(resident, x, batch):
        seen.add(resident["w"].dtype)
        return (resident["w"].astype(jnp.float32) * batch).sum(), jnp.float32(1)

    pieces = Blocks(lambda resident, batch, key: (jnp.zeros(()), None), lambda own, x, aux: x, end)
    config = Config(recipe="adam", model=Path("x"), dtype=dtype, learning_rate=1e-3, steps=20)
    trainer = Backprop(config, SimpleNamespace(pieces=lambda name: pieces), None)
    state = trainer.init({"resident": {"w": jnp.ones(2, dtype)}, "blocks": {"v": jnp.zeros(1, dtype)}}, key=jax.random.key(0))
    for _ in range(20):
        state, _ = trainer.step(state, jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(state.params["resident"]["w"].astype(jnp.float32), [0.98, 1.02], rtol=1e-4)
    assert seen == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_the_small_model_learns_its_text():
    content = np.frombuffer(b"the cat sat on the mat. " * 200 + b"a dog lay in the sun. " * 200, np.uint8)
    text = Text(content, np.where(np.arange(content.size) < 24 * 200, ord("c"), ord("d")).astype(np.uint8))
    settings = WarmStart(layers=1, width=16, steps=300, batch_size=16, length=32, learning_rate=0.02)
    decoder, params = transformer.make_decoder(settings.model), train(settings, text)
    pieces = (
        (b"the cat sat on the ma", "t"),
        (b"the mat. the cat sat on the mat. t:", "c"),
        (b"sun. a dog lay in the sun. a dog l:", "d"),
    )
    for piece, following in pieces:
        tokens = jnp.asarray([[*ByteTokenizer.prefix, *piece]])
        assert int(apply(decoder, params, tokens, jnp.ones(tokens.shape, bool))[0, -1].argmax()) == ord(following)


def test_one_file_is_split(tmp_path):
    write(tmp_path, all=25)
    parts = read_splits(tmp_path / "all.jsonl")
    texts = [record.fields["text"] for part in parts for record in part]
    assert list(map(len, parts)) == [21, 2, 2] and len(set(texts)) == 25
