"""Readers of traces, on small samples and on the public files, and workloads by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from cluster.simulation.workloads import block_traces, dialogues, readers
from cluster.simulation.workloads.catalogue import SOURCES
from cluster.simulation.workloads.clients import client_requests, read_clients
from cluster.simulation.workloads.records import Span, WorkloadError, WorkloadRequest, prompt_ids
from cluster.simulation.workloads.sources import describe_sources, load_workload
from cluster.simulation.workloads.transform import longest, mean_rate
from instance.request import RequestClass
from tests.unit.byte_tokenizer import byte_tokenizer

TRACES = Path(os.environ.get("DROVER_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
public = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not here")

MOONCAKE = [
    '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}',
    '{"timestamp": 40, "input_length": 1024, "output_length": 7, "hash_ids": [0, 3]}',
    "",
    '{"timestamp": 90, "input_length": 2000, "output_length": 1, "hash_ids": [0, 1, 4, 5]}',
]


def shape(requests: list[WorkloadRequest]) -> list[tuple[float, int, int, str]]:
    return [(r.arrival, r.prompt_tokens, r.output_tokens, r.tenant) for r in requests]


def test_mooncake() -> None:
    requests = block_traces.mooncake(MOONCAKE, "m", 0, {0: ("a", 0), 2: ("a", 1)})
    assert [one[:3] for one in shape(requests)] == [
        (0.0, 1100, 5),
        (0.04, 1024, 7),
        (0.09, 2000, 1),
    ]
    assert [(one.session, one.turn) for one in requests] == [("a", 0), ("", 0), ("a", 1)]
    one, two, three = (prompt_ids(request, range(50_000)) for request in requests)
    assert one[:512] == two[:512] == three[:512]
    assert one[512:1024] == three[512:1024] != two[512:]
    assert one[1024:] != three[1024:1100]


def test_ticks_are_spread_and_times_kept() -> None:
    def line(time: int) -> str:
        return json.dumps(
            {"timestamp": time, "input_length": 5, "output_length": 1, "hash_ids": [time]}
        )

    ticks = [0, 0, 0, 2999, 3000, 3001, 6000, 6000, 12_000, 12_000]
    spread = [one.arrival for one in block_traces.mooncake(map(line, ticks), "m", 1, {})]
    assert spread == sorted(spread)
    assert len(set(spread)) == len(ticks)
    assert all(abs(a - b / 1000) <= 3.002 for a, b in zip(spread, ticks, strict=True))
    exact = [0, 2000, 5000, 9000]
    times = [one.arrival for one in block_traces.mooncake(map(line, exact), "m", 1, {})]
    assert times == [0.0, 2.0, 5.0, 9.0]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("no", "not JSON"),
        ("3", "not a JSON object"),
        ('{"timestamp": 0, "output_length": 5, "hash_ids": []}', "input_length"),
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2, 3]}',
            "hash_ids: 2 ids are wanted for 600 tokens in blocks of 512; block=",
        ),
        ('{"timestamp": 0, "input_length": 2000, "output_length": 5, "hash_ids": [1]}', "4 ids"),
        ('{"timestamp": "x", "input_length": 5, "output_length": 5, "hash_ids": [1]}', "times"),
    ],
)
def test_mooncake_errors(line: str, wrong: str) -> None:
    with pytest.raises(WorkloadError, match=f"trace:2: .*{wrong}"):
        block_traces.mooncake([MOONCAKE[0], line], "trace", 0, {})


def test_rows_without_all_ids_share_what_they_name() -> None:
    def row(length: int, **more: object) -> str:
        return json.dumps({"timestamp": 5e9, "input_length": length, "output_length": 1, **more})

    lines = [row(40, hash_ids=["a", "b"]), row(39, hash_ids=["a", "b"]), row(39), row(39)]
    requests = block_traces.mooncake(lines, "m", 0, {}, block=16)
    assert [one[:2] for one in shape(requests)] == [(0.0, 40), (0.0, 39), (0.0, 39), (0.0, 39)]
    ids = [prompt_ids(request, range(50_000)) for request in requests]
    assert ids[0][:32] == ids[1][:32]
    assert len({tuple(one[32:39]) for one in ids}) == len({tuple(one) for one in ids}) == 4
    assert len({tuple(one[:16]) for one in ids}) == 3


BAILIAN = [
    {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.5, "hash_ids": [1]},
    {"chat_id": 8, "parent_chat_id": 7, "timestamp": 63.0, "hash_ids": [1, 2]},
    {"chat_id": 9, "parent_chat_id": 3, "timestamp": 64.0},
    {"chat_id": 10, "parent_chat_id": 8, "timestamp": 70.0, "hash_ids": [1, 2, 3]},
]


def test_bailian(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [json.dumps({"input_length": 30, "output_length": 3} | one) for one in BAILIAN[:1]]
    lines += [json.dumps({"input_length": 48, "output_length": 4} | one) for one in BAILIAN[3:]]
    lines[1:1] = [
        json.dumps({"input_length": 47, "output_length": 5} | one) for one in BAILIAN[1:3]
    ]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    requests = load_workload(f"bailian:{path}")
    assert [one[:3] for one in shape(requests)] == [
        (0.0, 30, 3),
        (1.5, 47, 5),
        (2.5, 47, 5),
        (8.5, 48, 4),
    ]
    assert [(one.session, one.turn) for one in requests] == [("7", 0), ("7", 1), ("9", 0), ("7", 2)]
    first, second, _, last = (prompt_ids(request, range(50_000)) for request in requests)
    assert first[:16] == second[:16]
    assert second[:32] == last[:32]
    assert first[16:30] != second[16:30]


CSV = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 23:59:59.5000000,4808,10\n"
        "2023-11-17 00:00:01.0000001,8,3\n",
        [(0.0, 4808, 10, "default"), (pytest.approx(1.5000001), 8, 3, "default")],
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,GPT-4,100,0,100,API log\n"
        "118,GPT-4,1087,230,1317,API log\n",
        [(0.0, 472, 18, "ChatGPT"), (113.0, 1087, 230, "GPT-4")],
    ),
    "vtc": (
        "req_id,adapter_dir,prompt_len,output_len,req_time\n0,x,13,199,1.5\n1,y,36,137,2.0\n",
        [(0.0, 13, 199, "x"), (0.5, 36, 137, "y")],
    ),
    "servegen": (
        "timestamp_s,client_id,input_length,output_length\n3.0,19,5,6\n1.0,4,7,8\n",
        [(0.0, 7, 8, "4"), (2.0, 5, 6, "19")],
    ),
}


@pytest.mark.parametrize("name", readers.TRACES)
def test_csv_traces(name: str, tmp_path: Path) -> None:
    text, wanted = CSV[name]
    assert shape(readers.trace(text.splitlines(), "t", readers.TRACES[name])) == wanted
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert shape(load_workload(f"{name}:{path}")) == wanted


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "t: empty"),
        ("a,b\n", "t: no column TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "t: no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,1,1\n", "t:2: TIMESTAMP: 'XXX'"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,1,1\n2,x,1\n", "t:3: ContextTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,1\n", "t:2: GeneratedTokens"),
    ],
)
def test_csv_errors(text: str, wrong: str) -> None:
    with pytest.raises(WorkloadError, match=wrong):
        readers.trace(text.splitlines(), "t", readers.TRACES["azure"])


def test_lengths_without_times() -> None:
    for head in readers.LENGTH_COLUMNS:
        assert readers.lengths([",".join(head), "5,6", "0,3", "7,8"], "t") == [(5, 6), (7, 8)]
    with pytest.raises(WorkloadError, match="no columns"):
        readers.lengths(["a,b", "1,2"], "t")
    with pytest.raises(WorkloadError, match="no lengths"):
        readers.lengths(["ContextTokens,GeneratedTokens"], "t")


ROUNDS = [
    "num_prefill_tokens,num_decode_tokens,conversation,turn",
    "74,918,0,1",
    "1000,5,0,2",
    "41,950,1,1",
]


def test_rounds() -> None:
    assert dialogues.rounds(ROUNDS, "t") == [[(74, 918), (8, 5)], [(41, 950)]]
    with pytest.raises(WorkloadError, match="t:4: turn: 3"):
        dialogues.rounds([*ROUNDS[:3], "2000,5,0,4"], "t")
    with pytest.raises(WorkloadError, match="t:4: num_prefill_tokens"):
        dialogues.rounds([*ROUNDS[:3], "1004,5,0,3"], "t")


SPOKEN = [
    {
        "id": "x",
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "ask"},
            {"from": "gpt", "value": "tell"},
            {"from": "gpt", "value": ""},
            {"from": "human", "value": "é"},
            {"from": "gpt", "value": ""},
            {"from": "human", "value": "never answered"},
        ],
    },
    {"conversations": [{"from": "gpt", "value": "nobody asked"}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]},
    {"conversations": []},
]


def test_texts_of_conversations() -> None:
    assert dialogues.texts(SPOKEN, "t") == [
        [("S\nask", "tell\n"), ("é", "")],
        [("hi", "")],
    ]
    for wrong in ({"x": 1}, 3, {"conversations": [3]}, {"messages": [{"role": "user"}, {}]}):
        with pytest.raises(WorkloadError, match="t: conversation 1: "):
            dialogues.texts([wrong], "t")
    with pytest.raises(WorkloadError, match="t: no conversation"):
        dialogues.texts(SPOKEN[1:2], "t")


def test_sharegpt_texts_are_counted_by_a_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    byte_tokenizer().save(str(model / "tokenizer.json"))
    (model / "config.json").write_text("{}")
    for content in (json.dumps(SPOKEN, indent=1), "\n".join(map(json.dumps, SPOKEN))):
        path = tmp_path / "chats.json"
        path.write_text(content, encoding="utf-8")
        requests = load_workload(f"sharegpt:{path}?tokenizer={model}&think=5&rate=100")
        found = {(one.session, one.turn): one for one in requests}
        assert {key: (one.prompt_tokens, one.output_tokens) for key, one in found.items()} == {
            ("s0", 0): (5, 5),
            ("s0", 1): (12, 1),
            ("s1", 0): (2, 1),
        }
        assert len(load_workload(f"sharegpt:{path}?tokenizer={model}&sessions=1")) in (1, 2)
    (model / "tokenizer.json").write_text("{}")
    for wrong in (model, tmp_path / "none"):
        with pytest.raises(WorkloadError, match="tokenizer"):
            load_workload(f"sharegpt:{path}?tokenizer={wrong}")


CLIENTS = {
    "x/chunk-0-trace.csv": "0,0,0,,0,0\n600,2.0,1.0,Gamma,1.0,0.5\n1200,1.0,1.0,Weibull,1.0,1.0\n",
    "x/chunk-0-dataset.json": json.dumps(
        {
            "0": {"input_tokens": "{45: 0.25, 46: 0.75}", "output_tokens": "{7: 1.0}"},
            "21600": {"input_tokens": "{}", "output_tokens": "{}"},
        }
    ),
    "x/chunk-1-trace.csv": "0,0.5,2.0,Gamma,0.25,8.0\n600,0.5,2.0,Gamma,0.25,8.0\n",
    "x/chunk-1-dataset.json": json.dumps(
        {"0": {"input_tokens": "{9: 1.0}", "output_tokens": "{3: 1.0}"}}
    ),
}


def test_clients(tmp_path: Path) -> None:
    pool = read_clients(CLIENTS, "pool")
    made = client_requests(3, pool, 300.0, 1500.0)
    assert Counter(one.tenant for one in made).keys() == {"client-0", "client-1"}
    of_first = [one for one in made if one.tenant == "client-0"]
    assert {one.prompt_tokens for one in of_first} == {45, 46}
    assert 0.6 < sum(one.prompt_tokens == 46 for one in of_first) / len(of_first) < 0.9
    assert all(300 <= one.arrival < 1500 for one in of_first)
    early = sum(one.arrival < 900 for one in of_first)
    assert 1000 < early < 1400
    assert 450 < len(of_first) - early < 750
    assert len(client_requests(3, pool, 300.0, 1500.0, 3.0)) > 2.5 * len(made)
    archive = tmp_path / "pool.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in CLIENTS.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    assert load_workload(f"servegen-clients:{archive}?from=300&seconds=1500", 3) == made


@pytest.mark.parametrize(
    ("path", "text", "wrong"),
    [
        ("x/chunk-0-trace.csv", "1,2\n", "chunk-0-trace.csv:1: six columns"),
        ("x/chunk-0-trace.csv", "0,x,1,Gamma,1,1\n", "rate"),
        ("x/chunk-0-trace.csv", "0,1,1,Zipf,1,1\n", "law"),
        ("x/chunk-0-dataset.json", "{", "chunk-0-dataset.json: not JSON"),
    ],
)
def test_client_errors(path: str, text: str, wrong: str) -> None:
    with pytest.raises(WorkloadError, match=wrong):
        read_clients({**CLIENTS, path: text}, "pool")
    with pytest.raises(WorkloadError, match="has no"):
        read_clients({"chunk-5-trace.csv": ""}, "pool")
    with pytest.raises(WorkloadError, match="no chunk"):
        read_clients({}, "pool")


# ---- by name


@pytest.mark.parametrize("name", [name for name, one in SOURCES.items() if not one.file])
def test_generators_by_name(name: str) -> None:
    requests = load_workload(f"{name}?limit=40", 5)
    assert len(requests) == 40
    assert requests == load_workload(f"{name}?limit=40", 5)
    assert requests != load_workload(f"{name}?limit=40", 6)


def test_parameters(tmp_path: Path) -> None:
    text = (
        "fixed?rate=20&requests=400&prompt=100-200&output=50&scale=0.5&scale-output=2&start=1"
        "&duration=10&max-len=140&fit=drop&tenants=3&skew=0&high=0.2"
    )
    requests = load_workload(text, 1)
    assert 100 < len(requests) < 300
    assert {one.tenant for one in requests} == {"tenant-1", "tenant-2", "tenant-3"}
    assert {one.request_class for one in requests} == {
        RequestClass.STANDARD,
        RequestClass.INTERACTIVE,
    }
    assert all(50 <= one.prompt_tokens <= 90 for one in requests)
    assert {one.output_tokens for one in requests} == {50}
    assert all(one.arrival < 10 for one in requests)
    path = tmp_path / "trace.csv"
    path.write_text(CSV["vtc"][0])
    assert mean_rate(load_workload(f"vtc:{path}?rate=8")) == pytest.approx(8.0)
    assert load_workload(f"vtc:{path}?speed=4")[-1].arrival == 0.125


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("llumnix-m-n", "did you mean .*llumnix-m-m"),
        ("mooncake", "mooncake:FILE"),
        ("fixed:x.csv", "takes no file"),
        ("fixed?rat=3", "unknown parameter 'rat'; did you mean rate"),
        ("fixed?rate", "rate=..."),
        ("fixed?rate=0", "fixed: rate: 0.0 is less"),
        ("fixed?prompt=9-3", "no length"),
        ("fixed?fit=bend", "fit: 'bend'"),
        ("sessions?think=50&think-p90=20", "think-p90"),
        ("drover:not-there.jsonl", "not-there.jsonl: No such file"),
        ("servegen-clients:not-there.tar", "not-there.tar"),
        ("fixed?requests=5&start=1e9", "no request is left"),
    ],
)
def test_wrong_descriptions(text: str, wrong: str) -> None:
    with pytest.raises(WorkloadError, match=wrong):
        load_workload(text)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"\x1f\x8b broken", b"\xff\xfe\x00", b"", b"\x1f\x8b\x08\x00"):
        path.write_bytes(content)
        for name in ("azure", "drover", "percentiles", "sharegpt", "servegen-clients"):
            with pytest.raises(WorkloadError, match=str(path)):
                load_workload(f"{name}:{path}")


def test_the_help_names_everything() -> None:
    text = describe_sources()
    assert all(f"  {name}" in text for name in SOURCES)


# ---- the public files


@public
@pytest.mark.parametrize(
    ("text", "rows", "prompt", "output"),
    [
        ("azure:azure2023_conv_0-2400s.csv.gz", 14_176, 1195, 202),
        ("azure:azure2023_code_0-2400s.csv.gz", 7_491, 2040, 28),
        ("mooncake:mooncake_conversation_0-2400s.jsonl.gz", 7_851, 12_428, 347),
        ("mooncake:mooncake_synthetic.jsonl.gz", 3_993, 15_326, 149),
        ("vtc:vtc_arena_27tenants.csv.gz", 1_500, 136, 256),
        ("servegen:servegen_deepseek-r1_DERIVED_requests_30min.csv.gz", 34_902, 1_017, 815),
        ("sharegpt:sharegpt_multiround_4000conv.csv.gz", 21_783, 2_340, 436),
    ],
)
def test_public_traces(text: str, rows: int, prompt: int, output: int) -> None:
    name, _, file = text.partition(":")
    requests = load_workload(f"{name}:{TRACES / file}")
    # A failed request is left out, and an empty answer counts as one token.
    assert rows - 5 <= len(requests) <= rows
    count = len(requests)
    assert sum(one.prompt_tokens for one in requests) / count == pytest.approx(prompt, rel=0.01)
    assert sum(one.output_tokens for one in requests) / count == pytest.approx(
        output, rel=0.01, abs=0.5
    )


@public
@pytest.mark.parametrize(
    ("file", "prompt", "output"),
    [
        ("lengths_sharegpt_firstturn.csv.gz", 299, 324),
        ("lengths_arxiv_summarization.csv.gz", 2_588, 291),
        ("lengths_bwb.csv.gz", 1_067, 1_613),
    ],
)
def test_public_lengths(file: str, prompt: int, output: int) -> None:
    requests = load_workload(f"lengths:{TRACES / file}?requests=10000&rate=5", 2)
    assert sum(one.prompt_tokens for one in requests) / 1e4 == pytest.approx(prompt, rel=0.15)
    assert sum(one.output_tokens for one in requests) / 1e4 == pytest.approx(output, rel=0.1)
    assert mean_rate(requests) == pytest.approx(5.0, rel=0.1)


@public
def test_public_percentiles_and_clients() -> None:
    requests = load_workload(f"percentiles:{TRACES / 'lengths_lmsys_percentiles.json'}", 2)
    assert sum(one.prompt_tokens for one in requests) / 1e4 == pytest.approx(92, rel=0.1)
    assert sum(one.output_tokens for one in requests) / 1e4 == pytest.approx(207, rel=0.1)
    path = TRACES / "servegen_deepseek-r1_clients_24h.tar.gz"
    drawn = load_workload(f"servegen-clients:{path}?from=75600&seconds=600", 2)
    assert 15 < mean_rate(drawn) < 25
    assert 25 <= len({one.tenant for one in drawn}) <= 40


@public
def test_mooncake_sessions_and_prefixes() -> None:
    base = TRACES / "mooncake_conversation_0-2400s"
    requests = load_workload(
        f"mooncake:{base}.jsonl.gz?sessions={base}.sessions.csv.gz&max-len=8192&fit=scale"
    )
    assert longest(requests) <= 8192
    assert len({one.session for one in requests}) == 5_426
    # Every request of this trace begins with the same system prompt.
    assert len({one.prompt[0].stream for one in requests}) == 1
    blocks: set[Span] = set()
    hits = tokens = 0
    for request in requests:
        for span in request.prompt:
            tokens += span.length
            hits += span.length * (span in blocks)
        blocks.update(request.prompt)
    assert hits / tokens == pytest.approx(0.36, abs=0.04)
