"""The official OpenAI client, unmodified, against the binary with its embedded demo model."""

import math
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

QUESTION = [{"role": "user", "content": "What is continuous batching?"}]


def connect(server, key="none"):
    return openai.OpenAI(base_url=f"{server.base}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(server):
    with connect(server) as client:
        yield client


def test_models_are_listed(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_chat(client):
    answer = client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=12, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_max_completion_tokens(client):
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 3


def test_streamed_chat_equals_the_whole_one(client):
    asked = dict(model="demo", messages=QUESTION, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_completions(client):
    answer = client.completions.create(model="demo", prompt="The prefix cache", max_tokens=8, temperature=0)
    assert answer.object == "text_completion" and answer.choices[0].text
    several = client.completions.create(model="demo", prompt=["A block", "A queue"], max_tokens=4)
    assert [choice.index for choice in several.choices] == [0, 1]
    by_ids = client.completions.create(model="demo", prompt=[100, 101, 102], max_tokens=4)
    assert by_ids.usage.prompt_tokens == 3


def test_streamed_completion(client):
    asked = dict(model="demo", prompt="The prefix cache", max_tokens=16, temperature=0)
    whole = client.completions.create(**asked)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True) if chunk.choices]
    assert "".join(pieces) == whole.choices[0].text


def test_log_probabilities(client):
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=3, temperature=0, logprobs=True, top_logprobs=4
    )
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-4
    text = client.completions.create(model="demo", prompt="A block", max_tokens=3, temperature=0, logprobs=2)
    assert len(text.choices[0].logprobs.token_logprobs) == len(text.choices[0].logprobs.tokens)


def test_several_choices_and_a_seed(client):
    asked = dict(model="demo", messages=QUESTION, max_tokens=16, temperature=1.5, n=3, seed=5)
    first, second = (client.chat.completions.create(**asked) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(texts) == 3 and len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]


def test_stop(client):
    asked = dict(model="demo", prompt="The prefix cache", max_tokens=24, temperature=0)
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[len(whole) // 2 :][:3]
    answer = client.completions.create(**asked, stop=[stop]).choices[0]
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"


def test_faults_are_the_clients_own_exceptions(client):
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model="demo", messages=QUESTION, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model="demo", messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as refused:
        ask(model="gpt-9", messages=QUESTION)
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="demo", input="a")


def test_a_key_is_asked_for(start, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-lab\n")
    keys.chmod(0o600)
    with start("--api-key-file", str(keys)) as server:
        with pytest.raises(openai.AuthenticationError):
            connect(server, "sk-wrong").models.list()
        assert connect(server, "sk-lab").models.list().data


def test_a_full_queue(start):
    def ask(_):
        try:
            connect(server).completions.create(
                model="demo", prompt="A queue", max_tokens=400, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            return int(error.response.headers["retry-after"])
        return None

    with start("--max-running", "1", "--max-waiting", "1") as server, ThreadPoolExecutor(8) as threads:
        waits = list(threads.map(ask, range(8)))
    refused = [seconds for seconds in waits if seconds is not None]
    assert 1 <= len(refused) <= 6 and all(seconds >= 1 for seconds in refused)
