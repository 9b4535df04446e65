"""Behaviours in answers: the lexicon, rates and transfer, and a judge as published."""
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from test_plots import refused, shows_something, write

import behaviours
import eval as evaluation


@pytest.mark.parametrize("text, shown", [
    ("Let me see the image again.", "visual reflection"),
    ("Wait, the figure shows a cube.", "visual reflection"),
    ("This approach won't work because it is odd.", "backtracking"),
    ("My previous assumption about the sequence was wrong.", "backtracking"),
    ("Let's first look at the numbers on the left.", "visual divide-and-conquer"),
    ("First, we need to find x.", "subgoal setting"),
    ("I will now verify this against the image.", "visual verification"),
    ("Let me check that 3 + 4 = 7.", "verification"),
    ("To get this answer, I need to find an object that is red.", "goal-driven visual tracing"),
    ("To get 75, we need a number divisible by 5.", "backward chaining"),
])
def test_the_lexicon_finds_each_behaviour(text, shown):
    assert behaviours.lexicon_count(shown, {"completion": f"It is so. {text} Done."}) == 1
    plain = "The image shows a cat. Its area is 12. So the answer is 4."
    assert behaviours.lexicon_count(shown, {"completion": plain}) == 0


def test_rates_and_transfer_by_hand(tmp_path, capsys):
    texts = ["This won't work. Let me see the image again.", "That was wrong. That is incorrect.",
             "That was wrong.", "Fine."]
    rows = [{"id": i, "completion": text} for i, text in enumerate(texts)]
    paths = [write(tmp_path / name, *rows[:n]) for name, n in (("a.jsonl", 4), ("b.jsonl", 3))]
    picture = tmp_path / "b.png"
    evaluation.main(["behaviours", "--predictions", *map(str, paths), "--plot", str(picture)])
    got = json.loads(capsys.readouterr().out)
    first, second = got["files"].values()
    # one of four looks again; three of four, however often, take something back
    assert (first["rates"]["visual reflection"], first["rates"]["backtracking"]) == (0.25, 0.75)
    assert first["transfer"]["visual reflection"] == pytest.approx(1 / 3)
    assert first["transfer"]["visual verification"] is None and got["judge"] == "lexicon"
    assert second["rates"]["backtracking"] == 1 and second["answers"] == 3
    assert shows_something(picture)


@pytest.fixture
def judge():
    """An endpoint that finds two verifications in "good", none elsewhere, and stays vague once."""
    class Endpoint(BaseHTTPRequestHandler):
        seen: list = []  # noqa: RUF012

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.seen.append((self.path, self.headers["Authorization"], body))
            prompt = body["messages"][0]["content"]
            count = 2 if "good" in prompt and "for verification" in prompt else 0
            said = "I can not say" if "vague" in prompt else f"Well: <count> {count} </count>"
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Endpoint.seen
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_as_published(tmp_path, capsys, monkeypatch, judge):
    url, seen = judge
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    rows = [{"id": i, "question": "How many?", "completion": text}
            for i, text in enumerate(("good", "bad", "vague"))]
    path = write(tmp_path / "p.jsonl", *rows)
    by = ["--judge", url, "--judge-model", "m"]
    evaluation.main(["behaviours", "--predictions", str(path), *by])
    (result,) = json.loads(capsys.readouterr().out)["files"].values()
    assert result["rates"]["verification"] == 0.5 and result["rates"]["backtracking"] == 0
    assert result["unjudged"] == 8  # the vague answer, once a behaviour
    assert len(seen) == 24  # in any order: eight are asked at a time
    for path, key, body in seen:
        prompt = body["messages"][0]["content"]
        assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
        assert prompt.startswith('Problem Statement: "How many?"\n\nModel\'s Reasoning: "')
        assert prompt.endswith("If none, use <count>0</count>.")


def test_a_judge_that_is_not_there(tmp_path):
    path = write(tmp_path / "p.jsonl", {"id": 1, "completion": "x"})
    command = ["behaviours", "--predictions", path, "--judge", "http://127.0.0.1:9/v1"]
    assert "belong together" in refused(*command)
    assert "no answer to a chat completion" in refused(*command, "--judge-model", "m")
