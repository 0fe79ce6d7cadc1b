"""Ratings read from both forms of an answer, and a reward model behind a real server."""

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gristmill.core.config import check
from gristmill.core.errors import InputError
from gristmill.data.chat import Conversation, Message
from gristmill.data.rows import Rating
from gristmill.generation.api import Completion, Request, SamplingParams
from gristmill.generation.endpoint import RowFailed, Target
from gristmill.generation.settings import Calls
from gristmill.judge import reward_client as module
from gristmill.judge.backends import rater_of
from gristmill.judge.judges import Judges
from gristmill.judge.programs import Verifier
from gristmill.judge.reward_client import ATTRIBUTES, RemoteRewardScorer, RewardModelEndpoint, parse_attributes, parse_choice, weight_set
from gristmill.judge.settings import Judging, Reward
from gristmill.model.reward import ATTRIBUTES as MODEL_ATTRIBUTES
from gristmill.model.reward import REWARD_WEIGHTS
from gristmill.runs.journal import Journal

# The example of the API's documentation.
TEXT = "helpfulness:1.6171875,correctness:1.6484375,coherence:3.3125,complexity:0.546875,verbosity:0.515625"
RATING = Rating(1.6171875, 1.6484375, 3.3125, 0.546875, 0.515625)
OTHER = Rating(0.0, 1.0, 2.0, 3.0, 4.0)

ratings = st.builds(Rating, *[st.floats(allow_nan=False, allow_infinity=False)] * 5)
orders = st.permutations(range(5))


def text_of(rating: Rating) -> str:
    return ",".join(f"{name}:{value}" for name, value in zip(ATTRIBUTES, astuple(rating), strict=True))


def entries(rating: Rating) -> list[dict[str, Any]]:
    return [{"token": name, "logprob": value, "top_logprobs": []} for name, value in zip(ATTRIBUTES, astuple(rating), strict=True)]


def choice(text: Any = None, content: Any = None) -> dict[str, Any]:
    return {"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}


# ---- both forms ----


def test_the_order_is_the_reward_model_s() -> None:
    assert ATTRIBUTES == MODEL_ATTRIBUTES


@pytest.mark.parametrize(("name", "score"), [("nemotron4-340b", 3.3156), ("llama3-70b", 3.9551), ("goodness", 3.8605)])
def test_the_documented_answer_and_its_weighted_sums(name: str, score: float) -> None:
    assert parse_attributes(TEXT) == parse_choice(choice(TEXT)) == parse_choice(choice("", entries(RATING))) == RATING
    assert RATING.score(weight_set(name)) == pytest.approx(score, abs=5e-5)
    assert [n for n, weights in REWARD_WEIGHTS.items() if abs(RATING.score(weights) - score) < 5e-5] == [name]


@given(ratings, orders)
def test_both_forms_hold_the_rating_in_any_order(rating: Rating, order: list[int]) -> None:
    pairs, numbered = text_of(rating).split(","), entries(rating)
    assert parse_attributes(" , ".join(pairs[i].replace(":", " : ") for i in order)) == rating
    shuffled = json.loads(json.dumps(choice(None, [numbered[i] for i in order])))
    assert parse_choice(shuffled) == rating


@given(ratings, st.sampled_from(ATTRIBUTES))
def test_what_is_missing_or_double_is_named(rating: Rating, name: str) -> None:
    at = ATTRIBUTES.index(name)
    pairs, numbered = text_of(rating).split(","), entries(rating)
    for change, words in ((lambda x: x[:at] + x[at + 1 :], f"lacks {name}"), (lambda x: x + [x[at]], f"has {name} twice")):
        with pytest.raises(InputError, match=words):
            parse_attributes(",".join(change(pairs)))
        with pytest.raises(InputError, match=words):
            parse_choice(choice(TEXT, change(numbered)))


def test_log_probabilities_go_before_the_text() -> None:
    assert parse_choice(choice(TEXT, entries(OTHER))) == OTHER


@pytest.mark.parametrize("logprobs", [None, {}, {"content": None}, {"content": []}, "x"])
def test_without_log_probabilities_the_text_counts(logprobs: Any) -> None:
    assert parse_choice({**choice(TEXT), "logprobs": logprobs}) == RATING
    assert parse_choice({"message": {"content": TEXT}}) == RATING


def test_the_tokens_of_a_text_are_no_rating() -> None:
    tokens = [{"token": t, "logprob": -0.1} for t in ("helpfulness", ":", "1", ".", "6")]
    assert parse_choice(choice(TEXT, tokens)) == RATING


def test_the_untrained_attributes_are_ignored() -> None:
    assert parse_attributes("quality:-1.5,toxicity:nan,humor:2,creativity:," + TEXT) == RATING
    assert parse_choice(choice(None, [{"token": "quality", "logprob": None}, *entries(RATING)])) == RATING


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "", "-", "high", "1_0", "0x1", "1 2", "\u0663"])
def test_a_text_that_is_no_number(value: str) -> None:
    with pytest.raises(InputError, match="The rating's coherence is .* which is no number"):
        parse_attributes(TEXT.replace("3.3125", value))


@pytest.mark.parametrize("value", [None, "3.5", True, [], float("nan"), float("inf"), 10**400])
def test_a_log_probability_that_is_no_number(value: Any) -> None:
    wrong = [e | ({"logprob": value} if e["token"] == "coherence" else {}) for e in entries(RATING)]
    with pytest.raises(InputError, match="The rating's coherence is .* which is no number"):
        parse_choice(choice(TEXT, wrong))


@pytest.mark.parametrize("text", ["", "I think it is good.", ":::,,,:", "x" * 1_000_000, "a:1," * 50_000])
def test_prose_is_no_rating(text: str) -> None:
    with pytest.raises(InputError, match="lacks helpfulness, .*is the model a reward model") as e:
        parse_attributes(text)
    assert len(str(e.value)) < 400


@pytest.mark.parametrize("wrong", [{}, {"message": {}}, {"message": {"content": None}}, {"text": TEXT}, {"logprobs": {"content": [1]}}])
def test_a_choice_with_neither_form(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="holds neither log-probabilities nor text"):
        parse_choice(wrong)


def test_unknown_weights() -> None:
    with pytest.raises(InputError, match="Unknown reward weights '340b': choose one of nemotron4-340b"):
        RemoteRewardScorer(Fake(), "340b")


# ---- a server ----


class Fake:
    async def complete(self, request: Request) -> list[Completion]:
        return [Completion(TEXT, 0, (), "length")]


class Server:
    """Rates an answer `[1, 2, 3, 4, 0]` with just these numbers; other answers get prose, and "later" fails the first time."""

    def __init__(self) -> None:
        self.form: Callable[[Rating], dict[str, Any]] = lambda rating: choice(text_of(rating), entries(rating))
        self.bodies: list[dict[str, Any]] = []
        self.asked: Counter[str] = Counter()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.up = threading.Event()
        self.thread.start()
        assert self.up.wait(10)

    def run(self) -> None:
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.rate)
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        self.loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self.up.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def rate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        answer = body["messages"][-1]["content"].removeprefix("later ")
        self.asked[answer] += 1
        if body["messages"][-1]["content"].startswith("later") and self.asked[answer] == 1:
            return web.Response(status=500)
        if answer == "refused":
            return web.Response(status=400)
        await asyncio.sleep(0.01 * (len(self.bodies) % 3))
        rating = Rating(*json.loads(answer)) if answer.startswith("[") else None
        reply = self.form(rating) if rating else choice("A fine answer.")
        return web.json_response({"choices": [reply], "usage": {"prompt_tokens": 7, "completion_tokens": 1}})


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def client(server: Server, **options: Any) -> RewardModelEndpoint:
    return RewardModelEndpoint([Target(server.url, "reward", **options)], concurrency=8, timeout=10, patience=10, retries=2)


def talk(answer: str) -> Conversation:
    return (Message("user", "hi"), Message("assistant", answer))


def test_conversations_are_rated_in_their_order(server: Server) -> None:
    wanted = [Rating(float(n), n / 2, 1.0, 0.25, -n / 8) for n in range(40)]
    talks = [talk(("later " if n % 5 == 0 else "") + str(list(astuple(rating)))) for n, rating in enumerate(wanted)]
    endpoint = client(server)
    rater = RemoteRewardScorer(endpoint)
    assert rater.score(talks) == wanted
    assert endpoint.usage.rows == 40 and endpoint.usage.errors == Counter({"500": 8})
    assert rater.total(wanted[2]) == pytest.approx(0.3 * 2 + 0.74 * 1 + 0.46 * 1 + 0.47 * 0.25 - 0.33 * -0.25)
    body = server.bodies[0]
    assert [m["role"] for m in body["messages"]] == ["user", "assistant"], "what is to be rated is sent as it is"
    assert body["model"] == "reward" and "temperature" not in body
    assert rater.score(talks[:2] * 2) == wanted[:2] * 2, "it can be used again, and the same answer may come twice"
    assert rater.score([]) == []


@pytest.mark.parametrize("form", [lambda r: choice(text_of(r)), lambda r: choice(None, entries(r)), lambda r: choice("", entries(r))])
def test_either_form_will_do(server: Server, form: Callable[[Rating], dict[str, Any]]) -> None:
    server.form = form
    rater = RemoteRewardScorer(client(server))
    (rating,) = rater.score([talk(str(list(astuple(RATING))))])
    assert rating == RATING and rater.total(rating) == pytest.approx(3.3156, abs=5e-5)


def test_one_row_at_a_time_within_a_loop(server: Server) -> None:
    async def run() -> Rating:
        async with client(server, logprobs=True) as endpoint:
            return await RemoteRewardScorer(endpoint, "goodness").rate(talk(str(list(astuple(RATING)))), "row-1")

    assert asyncio.run(run()) == RATING
    assert server.bodies[0]["logprobs"] is True


def test_what_goes_wrong_names_the_row(server: Server) -> None:
    good = talk("[1, 2, 3, 4, 0]")
    with pytest.raises(RowFailed, match="the answer is no rating: The rating lacks helpfulness.* The answer was 'A fine answer.'"):
        RemoteRewardScorer(client(server)).score([good, talk("what?")])
    with pytest.raises(RowFailed, match="refused"):
        RemoteRewardScorer(client(server)).score([talk("refused")])


@pytest.mark.parametrize("wrong", [(), (Message("user", "hi"),), (*talk("a"), Message("user", "b"))])
def test_a_talk_without_an_answer_is_refused_before_anything_is_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch, wrong: Conversation
) -> None:
    monkeypatch.setattr(module, "MAX_CONCURRENT", 1)  # so that the first would be sent before the second is looked at
    rater = RemoteRewardScorer(client(server))
    with pytest.raises(InputError, match="Conversation 1 does not end with the assistant"):
        rater.score([talk("[1, 2, 3, 4, 0]"), wrong])
    with pytest.raises(InputError, match="row-9 does not end with the assistant"):
        asyncio.run(rater.rate(wrong, "row-9"))
    assert not server.bodies


def test_whatever_completes_can_rate() -> None:
    assert RemoteRewardScorer(Fake()).score([talk("a")] * 3) == [RATING] * 3


def test_no_sampling_is_sent_but_what_the_recipe_names(server: Server, tmp_path: Path) -> None:
    given = {"base_url": server.url, "model": "reward", "fields": {"max_tokens": "limit"}, "extra_body": {"truncate": True}}
    reward = check(Reward, given)
    with Journal(tmp_path / "ratings.jsonl") as journal:
        rater = rater_of(reward, Calls(retries=0), journal)
        found = asyncio.run(rater.rate({"a": talk("[1, 2, 3, 4, 0]")}))
    assert found == {"a": Rating(1.0, 2.0, 3.0, 4.0, 0.0)}
    assert {name: value for name, value in server.bodies[-1].items() if name not in ("model", "messages")} == {
        "limit": SamplingParams().max_tokens,
        "truncate": True,
    }
    scorer = RemoteRewardScorer(client(server))
    scorer.score([talk("[1, 2, 3, 4, 0]")])
    assert server.bodies[-1].keys() == {"model", "messages"}


def test_settings_of_a_reward_endpoint() -> None:
    given = {"base_url": "http://host/v1", "model": "m"}
    assert "fields" not in check(Reward, given).model_dump() and "extra_body" not in check(Reward, given).model_dump(mode="json")
    assert check(Reward, given | {"fields": {"seed": None}}).model_dump()["fields"] == {"seed": None}
    with pytest.raises(InputError, match="fields and extra_body are of endpoints"):
        check(Reward, {"extra_body": {"a": 1}})
    with pytest.raises(InputError, match="extra_body sets 'model'"):
        check(Reward, given | {"extra_body": {"model": "n"}})


def test_what_endpoints_refused_is_told_of_a_stage() -> None:
    rater, writer = SimpleNamespace(left_out=Counter(seed=2)), SimpleNamespace(left_out=Counter(seed=1, top_p=1))
    told = Judges(Judging(), Verifier(), cast(Any, rater), client=cast(Any, writer)).left_out()
    assert told == {"left_out": {"seed": 3, "top_p": 1}} and Judges(Judging(), Verifier(), None).left_out() == {}
