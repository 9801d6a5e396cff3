"""Cleaning: what goes, what stays, what becomes of files, and that a second cleaning changes nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import prepare
from data.clean import clean, clean_file
from data.cleaning.duplicates import Duplicates
from data.cleaning.linter import faults
from data.cleaning.report import masked
from data.cleaning.rewrite import PLACEHOLDER, Change, words

ROOT = Path(__file__).resolve().parent.parent.parent

# --- identifiers ----------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    return prepare.main(["clean", *argv])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I saw Dr. Okonkwo-Bello's nurse.", "I saw Dr. [NAME]'s nurse."),
        ("Prof. Dr. Jürgen van der Berg operated.", "Prof. Dr. [NAME] operated."),
        ("Prof. Jacob Brown operated.", "Prof. [NAME] operated."),
        ("my dr. smith said so", "my dr. [NAME] said so"),
        ("Mrs O'Shaughnessy and Mr. 王伟 agree.", "Mrs [NAME] and Mr. [NAME] agree."),
        ("Hi Dr. Graves, I have a rash.", "Hi doctor, I have a rash."),
        ("Hello Anna, it hurts.", "Hello, it hurts."),
        ("Take rest. Regards, Dr. Zlata Vuković, MD", "Take rest."),
        ("Take rest.\n- Haluk Çelik, MBBS", "Take rest."),
        ("It helped. Thanks, Siobhan", "It helped. Thanks."),
        ("My name is Ngozi Abara and I cough.", "My name is [NAME] and I cough."),
        ("I am Zvonimir, 45 years old.", "I am [NAME], 45 years old."),
        ("my son Mark has hives", "my son [NAME] has hives"),
        ("Ask Wojciech Lis, MD about it.", "Ask [NAME], MD about it."),
        ("Call me at (555) 201-4567 x12.", "Call me at [PHONE]."),
        ("Ring +44 20 7946 0958 or 07911 123456.", "Ring [PHONE] or [PHONE]."),
        ("Mail a.b-c@mail.example.co.uk now.", "Mail [EMAIL] now."),
        ("See https://example.org/a?b=1.", "See [URL]."),
        ("Send it to Cañada de Ignacia Roura 15, Cádiz, 49353. Then rest.", "Send it to [ADDRESS]. Then rest."),
        ("Send it to Pátio da Costa, 3, Alto Das Antenas, 73053568 Martins de Minas / DF.", "Send it to [ADDRESS]."),
        ("Send it to 16, rue Hernandez, 97398 Julien-les-Bains.", "Send it to [ADDRESS]."),
        ("Send it to 58 Droney Street V69 VH75 Una Ville.", "Send it to [ADDRESS]."),
        ("Send it to Krležin gvozd 2a, 03435 Komiža.", "Send it to [ADDRESS]."),
        ("Send it to 7 Rose Amble, RD 3, Rangikiwi 9709.", "Send it to [ADDRESS]."),
        ("Send it to B06 L25 Tabayoc Village, Garnet Street, Quezon City, 1369 Metro Manila.", "Send it to [ADDRESS]."),
        ("Send it to PSC 7206, Box 4379, APO AP 78514.", "Send it to [ADDRESS]."),
        ("Send it to 3364 Clarence Indlela, Kimberley, 1220.", "Send it to [ADDRESS]."),
        ("Send it to rue Aeby 33, 3453 Vuille-sur-Mer.", "Send it to [ADDRESS]."),
        ("MRN: 00123456, SSN 123-45-6789.", "MRN: [RECORD NUMBER], SSN [RECORD NUMBER]."),
        ("I live at 12 Elm Road, Leeds LS1 4AP.", "I live at [ADDRESS]."),
        ("DOB: 12/03/1980. Born on 3 May 1971.", "DOB: [DATE OF BIRTH]. Born on [DATE OF BIRTH]."),
        ("Iâ€™m “fine”\u200b,\xa0really.", 'I\'m "fine", really.'),
        ("Pain in the abdomen.The cause is gas.", "Pain in the abdomen. The cause is gas."),
        ("Thanks for using Chat Doctor. Rest well. Hope I have answered your query.", "Rest well."),
        ("Rest well. Let me know if I can assist you further. Regards,", "Rest well."),
    ],
)
def test_goes(before: str, after: str) -> None:
    assert clean(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "The drug, the drip and lactate dehydrogenase; Guillain-Barré syndrome, children with hydrocephalus.",
        "My son has Dravet syndrome, his brother Creutzfeldt Jakob disease, her mother Crohn's disease.",
        "My brother Down syndrome clinic visit went well. My father Parkinson disease. Graves disease, Bell's palsy.",
        "Becker MD is milder. She has MS, saw a PA and an MD. MR imaging and DR grading were done.",
        "Blood pressure 120/80, pulse 72-80, glucose 5.6-7.0, 150 000 platelets, 3000000000 cells, on 2019-04-05.",
        "Take 500-1000 mg twice, 10/325 mg at night, from 12/03/2020 to 05/04/2020, aged 45.",
        "Doctor, I have a headache. Doctor Please help. Hello doctor, hi there, dear Sir or Madam.",
        "I am Diabetic. I am Indian, 45 years old. This is Amyloidosis. I am Rh Negative.",
        "Call 911 or 112 at once. Case 3 of 10. Room 12. Type 2 diabetes. COVID-19, IL-6, HbA1c 7.2 %.",
        "Cervical cancer, stage II. Vitamin B12 and T4 are low.",
        "می‌خواهم 👩‍⚕️ नमस्ते 你好。",
        "",
    ],
)
def test_stays(text: str) -> None:
    changes: list[Change] = []
    assert clean(text, changes) == text
    assert not changes


def test_clinical_words_are_never_cut(shared: Path) -> None:
    """What ChatDoctor's own scrubbing did to "dehydrogenase" and "children"."""
    table = (shared / "data/chatdoctor/format_dataset.csv").read_text()
    with_dr = sorted({w for w in re.findall(r"[A-Za-z]+", table) if "dr" in w.lower()})
    assert len(with_dr) > 100
    for word in with_dr:
        for text in (f"The {word} was given.", f"my {word} is low", f"{word}."):
            assert clean(text) == text


def test_word_lists_do_not_contradict_each_other() -> None:
    assert not words("names.txt") & words("not_names.txt")
    assert not words("names.txt") & words("clinical_nouns.txt")


PIECES = st.sampled_from(
    [
        "Hi Dr. Smith, ", "Hello Anna, ", "Regards,\n", "Dr", "Dr. ", "[NAME]", "[PHONE]", "my name is ", "Ngozi ",
        "I am ",
        "Mark", ", MD", " - ", "\n", "  ", "555-201-4567", "a@b.org", "www.x.com", "Thanks for using Chat Doctor. ",
        "é", "王",
        "ChatDoctor", "12 Elm Road", ", ", ". ", "the drug", "Crohn", "'s ", "â€™", "\u200b", "born 1/2/1980",
        "MRN 12345", "[",
        "]", "I hope this helps.", "Take care", "Doctor", "LS1 4AP", "Best wishes", "[ADDRESS]", "Springfield",
    ]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES | st.text(max_size=8), max_size=14).map("".join))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    once = clean(text)
    changes: list[Change] = []
    assert clean(once, changes) == once, changes


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_placeholders_are_never_nested(text: str) -> None:
    text = text.replace("[", "").replace("]", "")
    assert not re.search(r"[\[\]]", PLACEHOLDER.sub("", clean(text)))


CLINICAL = st.sampled_from(
    ["fever", "cough", "drug", "drip", "syndrome", "asthma", "120/80", "mg", "dose", "the", "a", "Crohn's", "of", "5.6"]
)  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "He took 10 Units Lantus, Heparin 5000 and slept.",
        "Heparin 5000, Warfarin, 10000 in all. Then rest.",
        "Platelets were 5, 12000 White cells were seen.",
        "Vitamin B12 L5 Disc herniation, pain for 3 weeks.",
        "Hemoglobin 12, Creatinine, 1345 was measured.",
        "Table 3 Adverse Events, Placebo, 4321 patients.",
        "Grade 3 Ductal Carcinoma, Stage 2 Tumor, Ki 67 was high.",
        "United Cerebral Palsy of Nebraska helps.",
        "In 1998 Smith, Jones, 2004 found 12345 cases / US alone.",
    ],
)
def test_what_only_looks_like_an_address_is_left(text: str) -> None:
    assert clean(text) == text


@settings(max_examples=100, deadline=None)
@given(st.lists(CLINICAL, min_size=1, max_size=20).map(" ".join))
def test_text_without_identifiers_is_unchanged(text: str) -> None:
    assert clean(text) == text


@pytest.mark.parametrize("unit", ["Ab ", "Dr. ", "any more ", "1-", "12 Ab, ", "\n", " ", "Ab de la ", "regards "])
def test_no_rule_runs_away(unit: str) -> None:
    """A text of 30,000 characters takes well under a second, whatever it repeats; a runaway pattern takes minutes."""
    started = time.process_time()
    for opening in ("", "Please let me know if ", "my address is 1 "):
        text = clean(opening + unit * (30_000 // len(unit)) + "zzz")
        list(faults(text, answer=True))
    assert time.process_time() - started < 10


# --- faults and repeats ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("You need a test. Patient: Okay, doctor.", "role_leak"),
        ("Please generate a dialogue between a doctor and a patient.", "prompt_leak"),
        ("As a language model AI, I cannot.", "language_model"),
        ("I??e been ill.", "lost_quotes"),
        ("You should take this because the", "truncated"),
        ("This is lactic acid dehy ChatDoctor.", "corrupt_scrub"),
        ("Guillain-Barré syn Chat Doctor", "corrupt_scrub"),
        ("an anti-tubercular ChatDoctor.", "corrupt_scrub"),
        ("of the body.169,Amyloidosis,['Nailbiting'].", "generator_row"),
    ],
)
def test_faults(text: str, fault: str) -> None:
    assert fault in {f.name for f in faults(text, answer=True)}


@pytest.mark.parametrize(
    "text", ["Asthma.", "Take one tablet (5 mg).", "Is it bad?? I wonder.", "Asthma", "Regards, ChatDoctor."]
)
def test_no_fault(text: str) -> None:
    assert not list(faults(text, answer=True))


def test_faults_of_chatdoctor5k(shared: Path) -> None:
    counts: dict[str, int] = {}
    for record in json.loads((shared / "data/chatdoctor/chatdoctor5k.json").read_text()):
        for name in {f.name for key in ("input", "output") for f in faults(record[key], key == "output")}:
            counts[name] = counts.get(name, 0) + 1
    found = {
        "role_leak": 161,
        "lost_quotes": 39,
        "prompt_leak": 1,
        "language_model": 1,
        "generator_row": 1,
        "truncated": 2,
    }
    assert counts == found


def test_near_duplicates() -> None:
    text = " ".join(f"word{i}" for i in range(60))
    index = Duplicates(0.8)
    assert index.earlier(1, text) is None
    assert index.earlier(2, text + " more") == 1
    assert index.earlier(3, text.upper()) == 1
    assert index.earlier(4, " ".join(f"other{i}" for i in range(60))) is None
    assert index.earlier(5, "") is None
    assert index.earlier(6, "") == 5


# --- files ----------------------------------------------------------------------------------------

MESSY = {"id": 7, "input": "Hi Dr. Smith,  I cough.", "output": "Take rest. Regards, Dr. Rao"}
SHAPES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {"instruction": "Help.", **MESSY},
        {"instruction": "Help.", "id": 7, "input": "Hi doctor, I cough.", "output": "Take rest."},
    ),
    (
        {"input": "I am Dr. Rao.", "answer_icliniq": "Hi Dr. Rao, rest.", "n": 1.5},
        {"input": "I am Dr. [NAME].", "answer_icliniq": "Hi doctor, rest.", "n": 1.5},
    ),
    (
        {"messages": [{"role": "user", "content": "Hello Anna, hi."}, {"role": "assistant", "content": "Yes."}]},
        {"messages": [{"role": "user", "content": "Hello, hi."}, {"role": "assistant", "content": "Yes."}]},
    ),
    (
        {"conversations": [{"from": "human", "value": "Dr. Rao?"}, {"from": "gpt", "value": "Yes."}]},
        {"conversations": [{"from": "human", "value": "Dr. [NAME]?"}, {"from": "gpt", "value": "Yes."}]},
    ),
    (
        {"instruction": "Ask.", "instances": [{"input": "", "output": "Dr. Rao."}]},
        {"instruction": "Ask.", "instances": [{"input": "", "output": "Dr. [NAME]."}]},
    ),
    ({"text": "Dr. Rao."}, {"text": "Dr. [NAME]."}),
    (
        {"prompt": "Dr. Rao?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Dr. [NAME]?", "chosen": "Yes.", "rejected": "No."},
    ),
]


@pytest.mark.parametrize("layout", ["lines", "array", "indented"])
@pytest.mark.parametrize(("before", "after"), SHAPES)
def test_shapes(tmp_path: Path, layout: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    same = {"instruction": "Say é.", "output": "It is 1.50 € today.", "x": [None, True]}
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    if layout == "lines":
        source.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in (before, same)))
    else:
        source.write_text(json.dumps([before, same], indent=4 if layout == "indented" else None, ensure_ascii=False))
    kept = source.read_bytes()
    clean_file(source, target, duplicates=0)
    text = target.read_text()
    read = [json.loads(line) for line in text.splitlines()] if layout == "lines" else json.loads(text)
    assert read == [after, same]
    assert source.read_bytes() == kept
    assert [list(r) for r in read] == [list(before), list(same)]


def test_report_and_diff_mask_what_they_tell_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    text = "My name is Ngozi Abara, call 555-201-4567. I saw Dr. Vuković."
    source.write_text(json.dumps({"instruction": text, "output": "Yes. Patient: Okay."}) + "\n")
    assert main([str(source), str(tmp_path / "a.jsonl")]) == 0
    assert "3 places: identifiers" in capsys.readouterr().out
    told = [(tmp_path / f"a.jsonl{s}").read_text() for s in (".report.md", ".report.json", ".diff")]
    for report in told:
        assert "name_after_title" in report
        assert not re.search("Ngozi|Abara|201|Vuk", report)
    assert json.loads(told[1])["faults"]["role_leak"]["records"] == [1]
    assert main([str(source), str(tmp_path / "b.jsonl"), "--show"]) == 0
    assert "Dr. Vuković" in (tmp_path / "b.jsonl.diff").read_text()


def test_masked_keeps_placeholders_and_plain_words() -> None:
    assert masked("he saw Dr [NAME] and Ngozi 555") == "he saw Dr [NAME] and N… 5…"


def test_drop_check_and_duplicates(tmp_path: Path) -> None:
    source, answer = tmp_path / "in.jsonl", "Rest for a week and drink a lot of water every day."
    rows = [("a", answer), ("b", "No. Patient: Okay."), ("a", answer), ("c", "Thanks for using Chat Doctor.")]
    source.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in rows))
    assert main([str(source), str(tmp_path / "a.jsonl"), "--check"]) == 1
    report = json.loads((tmp_path / "a.jsonl.report.json").read_text())
    assert report["dropped"] == {"near-duplicate": [3], "nothing is left of output": [4]}
    assert report["duplicates"] == [{"record": 3, "repeats": 1}]
    assert report["records"] == {"read": 4, "changed": 1, "written": 2}
    assert main([str(source), str(tmp_path / "b.jsonl"), "--drop", "--duplicates", "0"]) == 0
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert [json.loads(line)["instruction"] for line in lines] == ["a", "a"]


GOOD = '{"instruction": "Why?", "output": "Dr. Rao knows."}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '\n{"instruction": "x", "output": }\n', "record 2"),
        ('{"a": 1}', "no text to clean"),
        ('{"instruction": 5, "output": "x"}', "text is wanted"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content"),
        ('{"instruction": "\\ud800", "output": "x"}', "not valid Unicode"),
        ("", "empty"),
        ("<html>", "HTML"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    assert main([str(source), str(tmp_path / "out.jsonl")]) == 2
    err = capsys.readouterr().err
    line = [part for part in err.splitlines() if part.startswith("error: ")]
    assert len(line) == 1
    assert message in line[0]
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_bad_records_can_be_set_aside(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(GOOD + '\n{"oops\n' + GOOD.replace("Why", "How") + "\n")
    assert main([str(source), str(target), "--skip_bad_records", "--duplicates", "0"]) == 0
    assert len(target.read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out.jsonl.rejected.jsonl").read_text())["raw"] == '{"oops'
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["dropped"] == {"cannot be read": [2]}


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(GOOD)
    assert main([str(source), str(source)]) == 2
    assert "IN itself" in capsys.readouterr().err
    (tmp_path / "out.jsonl.diff").write_text("mine")
    assert main([str(source), str(tmp_path / "out.jsonl")]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json"), str(tmp_path / "x")]) == 2
    assert main([str(tmp_path / "none.txt"), str(tmp_path / "x")]) == 2
    assert source.read_text() == GOOD


def test_a_killed_run_leaves_no_half_file(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(GOOD.replace("Why", f"Why {i}") + "\n" for i in range(60_000)))
    command = [sys.executable, "-m", "data.prepare", "clean", str(source), str(tmp_path / "out.jsonl")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    staged: list[Path] = []
    for _ in range(600):
        staged = [p for p in tmp_path.glob(".out*/out.jsonl") if p.stat().st_size]
        if staged or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert staged
    assert not (tmp_path / "out.jsonl").exists()
    source.write_text(GOOD)
    assert main([str(source), str(tmp_path / "out.jsonl")]) == 0
    assert not list(tmp_path.glob(".out*"))  # what the killed run left is gone


# --- LanguageTool ---------------------------------------------------------------------------------


class Stub(BaseHTTPRequestHandler):
    """Says "has" for "have" after "He", and would respell a drug."""

    def _send(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send([{"name": "English (US)", "code": "en", "longCode": "en-US"}])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        text = parse_qs(body)["text"][0]
        found = [("He have", "He has", "GRAMMAR"), ("metoprolol", "metropole", "TYPOS")]
        matches = [
            {
                "message": "", "shortMessage": "", "replacements": [{"value": after}], "offset": text.index(before),
                "length": len(before), "context": {"text": text, "offset": text.index(before), "length": len(before)},
                "sentence": text,
                "rule": {"id": "X", "description": "", "issueType": "", "category": {"id": kind, "name": kind}},
            }
            for before, after, kind in found if before in text
        ]  # fmt: skip
        self._send({"matches": matches, "language": {"name": "English", "code": "en-US"}})

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    http = HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()


def test_languagetool_corrects_grammar_and_no_drug(tmp_path: Path, server: str) -> None:
    pytest.importorskip("language_tool_python")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"instruction": "He have pain.", "output": "He takes metoprolol. He have time."}))
    assert main([str(source), str(target), "--languagetool", server]) == 0
    assert json.loads(target.read_text()) == {
        "instruction": "He has pain.",
        "output": "He takes metoprolol. He has time.",
    }
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["rules"]["languagetool"]["count"] == 2


def test_languagetool_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(GOOD)
    assert main([str(source), str(tmp_path / "out.jsonl"), "--languagetool", "http://127.0.0.1:9"]) == 2
    assert "no LanguageTool server answers" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "language_tool_python", None)
    assert main([str(source), str(tmp_path / "out.jsonl"), "--languagetool", "http://127.0.0.1:9"]) == 2
    assert "pip install language_tool_python" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.jsonl"]
