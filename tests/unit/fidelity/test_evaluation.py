"""`sale-prefill evaluate`: items hold their answers, scores are the model's own, and what the command writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fidelity_retrieval
from sale_attention import DEFAULT_TAU, SaleConfig
from sale_attention.transformers_integration import AttentionContext, attention_context
from sale_fidelity.evaluation import figures, retrieval
from sale_fidelity.evaluation.attention_error import ALWAYS, UNSEEN, drawn_mask, head_errors
from sale_fidelity.evaluation.documents import default_documents
from sale_fidelity.evaluation.evaluate import FORMAT
from sale_fidelity.evaluation.haystack import Haystack, bundled_paragraphs, planted
from sale_fidelity.evaluation.paired import worst_loss
from sale_fidelity.evaluation.scoring import candidate_scores, encode_item
from sale_fidelity.evaluation.setting import uniform_setting
from sale_fidelity.evaluation.tasks import TASKS, Item, make_item
from sale_fidelity.models import FidelityModel, load_model
from sale_prefill_client.cli import main
from tests.support import save_tiny_llama
from tests.unit.client.texts import save_byte_tokenizer

DENSE = AttentionContext(dense=True)
#: A byte a token: 3,000 are what 700 are to a real tokenizer.
TOKENS = 3000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, and a tokenizer whose tokens are bytes."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny-with-tokenizer"))
    return save_byte_tokenizer(folder, eos_token="<|end|>", tokenizer_class="PreTrainedTokenizerFast")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> FidelityModel:
    return load_model(str(model_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack(bundled_paragraphs(), len)


class TestItems:
    @pytest.mark.parametrize("task", TASKS)
    def test_an_item_is_the_same_for_the_same_seed_and_another_for_another(self, task: str, haystack: Haystack) -> None:
        items = [make_item(task, haystack, seed, TOKENS, 0.5) for seed in (7, 7, 8)]
        assert items[0] == items[1]
        assert items[0].prompt != items[2].prompt

    @pytest.mark.parametrize("task", TASKS)
    def test_every_right_answer_stands_in_the_document(self, task: str, haystack: Haystack) -> None:
        for seed in range(5):
            item = make_item(task, haystack, seed, TOKENS, seed / 4)
            assert 1 <= item.num_right < len(item.candidates)
            assert len(set(item.candidates)) == len(item.candidates)
            for answer in item.candidates[: item.num_right]:
                assert all(part in item.prompt for part in answer.split("\n"))

    @pytest.mark.parametrize("task", TASKS)
    def test_no_candidate_is_the_beginning_of_another(self, task: str, haystack: Haystack) -> None:
        candidates = make_item(task, haystack, 0, TOKENS, 0.5).candidates
        pairs = [(a, b) for a in candidates for b in candidates if a is not b]
        assert not any(b.startswith(a) for a, b in pairs)

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
    def test_the_answer_stands_at_its_depth(self, task: str, depth: float, haystack: Haystack) -> None:
        item = make_item(task, haystack, 3, 30_000, depth)
        first = item.candidates[0].split("\n")[-1].split('"')[-1]
        assert item.prompt.index(f'"{first}"') / len(item.prompt) == pytest.approx(depth, abs=0.06)

    @pytest.mark.parametrize("task", TASKS)
    def test_a_prompt_is_nearly_as_long_as_asked_and_never_longer(self, task: str, haystack: Haystack) -> None:
        for tokens in (8000, 30_000):
            item = make_item(task, haystack, 1, tokens, 0.5)
            length = len(item.prompt) + len(item.lead) + max(map(len, item.candidates))
            assert tokens - 1100 <= length <= tokens

    def test_an_unknown_task_and_too_few_tokens_are_refused_by_name(self, haystack: Haystack) -> None:
        with pytest.raises(ValueError, match=r"no task 'riddle'; there are needle, multi_key"):
            make_item("riddle", haystack, 0, TOKENS, 0.5)
        with pytest.raises(ValueError, match="50 tokens are too few for the task 'needle'"):
            make_item("needle", haystack, 0, 50, 0.5)

    def test_a_longer_plan_goes_on_where_a_shorter_one_ends(self) -> None:
        short, long = (list(retrieval.Plan(count).arguments()) for count in (30, 250))
        assert long[:30] == short
        assert len(set(long)) == 250
        cells = {(task, tokens, depth) for task, _, tokens, depth in long}
        assert len(cells) == len(TASKS) * len(retrieval.LENGTHS) * len(retrieval.DEPTHS)

    def test_needles_are_planted_in_the_order_of_their_depths(self) -> None:
        paragraphs = ["aaaa", "bbbb", "cccc", "dddd"]
        assert planted(paragraphs, ["last", "first", "middle"], [1.0, 0.0, 0.5]).split("\n") == [
            *("first", "aaaa", "bbbb", "middle", "cccc", "dddd", "last")
        ]


class TestScores:
    @pytest.mark.parametrize("task", TASKS)
    def test_they_are_those_of_each_candidate_run_by_itself(
        self, task: str, model: FidelityModel, haystack: Haystack
    ) -> None:
        encoded = encode_item(model, make_item(task, haystack, 0, 2000, 0.5))
        found = candidate_scores(model, encoded, DENSE)
        expected = [_alone(model, encoded.prompt_ids, candidate) for candidate in encoded.candidate_ids]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)

    def test_one_token_candidates_need_no_second_pass(self, model: FidelityModel) -> None:
        item = Item("needle", 0, 0, 0.5, "one or two?", "It is ", ("1", "2"), 1)
        encoded = encode_item(model, item)
        expected = [_alone(model, encoded.prompt_ids, candidate) for candidate in encoded.candidate_ids]
        torch.testing.assert_close(candidate_scores(model, encoded, DENSE), torch.tensor(expected))

    def test_the_prompt_is_in_the_chat_template(self, model: FidelityModel, haystack: Haystack) -> None:
        item = make_item("needle", haystack, 0, 2000, 0.5)
        text = model.tokenizer.decode(encode_item(model, item).prompt_ids)
        assert text.startswith("<|start|>system\nBe kind.<|end|>")
        assert text.endswith("<|start|>assistant\n" + item.lead)

    def test_sale_with_tau_zero_is_dense(self, model: FidelityModel, haystack: Haystack) -> None:
        encoded = encode_item(model, make_item("multi_key", haystack, 0, 2500, 0.5))
        setting = uniform_setting(model, 0.0, 1, SaleConfig())
        outcome = retrieval.run_item(model, encoded, setting)
        assert outcome.dense_margin == pytest.approx(outcome.sale_margin, abs=1e-3)
        assert outcome.density == 1.0

    def test_an_item_longer_than_the_context_is_refused(self, model: FidelityModel, haystack: Haystack) -> None:
        with pytest.raises(ValueError, match=r"takes 4096; evaluate shorter ones \(--lengths\)"):
            encode_item(model, make_item("needle", haystack, 0, 6000, 0.5))


class TestWorstLoss:
    def test_nothing_lost_in_many_items_bounds_the_loss_tightly(self) -> None:
        # z^2 / (n + z^2) with z the 95th percentile.
        assert worst_loss(1500, 0, 0) == pytest.approx(2.7055 / 1502.7055, rel=1e-3)

    def test_it_nears_the_normal_bound_where_many_pairs_differ(self) -> None:
        n, lost, won = 10_000, 420, 400
        variance = lost + won - (lost - won) ** 2 / n
        assert worst_loss(n, lost, won) == pytest.approx((lost - won + 1.645 * variance**0.5) / n, rel=0.02)

    @pytest.mark.parametrize(("items", "lost", "won"), [(44, 1, 0), (50, 9, 5), (300, 2, 12), (1500, 31, 24)])
    def test_at_the_bound_the_score_test_is_at_its_limit(self, items: int, lost: int, won: int) -> None:
        loss = worst_loss(items, lost, won, 0.975)
        # The share of pairs won, given that loss, at which what was found is likeliest: by search, not by formula.
        shares = torch.linspace(max(0.0, -loss), (1 - loss) / 2, 1_000_001, dtype=torch.float64)[1:-1]
        same = 1 - loss - 2 * shares
        likelihood = lost * (shares + loss).log() + won * shares.log() + (items - lost - won) * same.log()
        share = float(shares[likelihood.argmax()]) if won else 0.0
        score = (lost - won - items * loss) / (items * (2 * share + loss - loss**2)) ** 0.5
        assert score == pytest.approx(-1.95996, abs=0.01)

    def test_it_grows_with_what_is_lost_and_is_above_what_was_found(self) -> None:
        bounds = [worst_loss(200, lost, 3) for lost in range(10)]
        assert bounds == sorted(bounds)
        assert all(bound > (lost - 3) / 200 for lost, bound in enumerate(bounds))

    def test_impossible_counts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="7 lost and 4 won cannot be of 10 paired items"):
            worst_loss(10, 7, 4)


class TestAttentionErrors:
    def test_a_dense_head_has_none_and_tau_ordering_shows(self, model: FidelityModel) -> None:
        tokens = default_documents(model, 1600, 1)[0].token_ids
        settings = [uniform_setting(model, tau, 1, SaleConfig()) for tau in (0.0, 0.1, float("inf"))]
        exact, some, most = head_errors(model, tokens, settings)
        assert exact.pooled_p99_error < 1e-4
        assert exact.density.min() == 1.0
        assert exact.pooled_mean_error <= some.pooled_mean_error <= most.pooled_mean_error
        assert exact.density.mean() >= some.density.mean() >= most.density.mean()
        assert some.mean_error.shape == (model.num_layers, model.num_query_heads)

    def test_the_drawn_mask_has_the_density_that_was_counted(self, model: FidelityModel) -> None:
        tokens = default_documents(model, 1600, 1)[0].token_ids
        config = SaleConfig()
        setting = uniform_setting(model, 0.1, 1, config)
        errors = head_errors(model, tokens, [setting])[0]
        mask = drawn_mask(model, tokens, setting, 1, 2)
        sparse = mask.cells[config.dense_rows // config.query_block :]
        kept = (sparse >= 2).sum() / (sparse != UNSEEN).sum()
        assert float(kept) == pytest.approx(float(errors.density[1, 2]), abs=1e-6)
        assert (mask.cells[: config.dense_rows // config.query_block] % ALWAYS == 0).all()

    def test_a_document_without_sparse_rows_is_refused(self, model: FidelityModel) -> None:
        setting = uniform_setting(model, DEFAULT_TAU, 1, SaleConfig())
        with pytest.raises(ValueError, match="500 tokens: rows are sparse from position 1024 on"):
            head_errors(model, list(range(250)) * 2, [setting])


class TestCommand:
    @pytest.fixture
    def run(self, model_folder: Path) -> Callable[..., int]:
        def run(*arguments: str) -> int:
            options = ["--device", "cpu", "--tokens", "1400", "--documents", "2", "--items", "5", "--lengths", "2000"]
            return main(["evaluate", str(model_folder), *options, *arguments])

        return run

    def test_it_writes_json_and_pictures_and_prints_a_table(
        self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file, folder = tmp_path / "found.json", tmp_path / "pictures"
        assert run("--profile", "none", "--tau", "0.05", "--output", str(file), "--figures", str(folder)) == 0
        report = json.loads(file.read_text())
        assert (report["format"], report["version"], report["dtype"]) == (FORMAT, 1, "float32")
        assert report["setting"] == "uniform tau 0.05, stride 1"
        assert report["agreement"]["pooled"]["positions"] == 2 * (1400 - 700 - 1)
        assert sum(piece["positions"] for piece in report["agreement"]["by_position"]) == 2 * 699
        assert {item["task"] for item in report["retrieval"]["items"]} == set(TASKS)
        assert report["retrieval"]["summary"]["pooled"]["items"] == 5
        assert report["attention"]["settings"][0]["name"] == report["setting"]
        assert {picture.stem for picture in folder.iterdir()} == {name for name, _, _ in figures._PICTURES}
        assert "worse by at most" in capsys.readouterr().out

    def test_pictures_come_out_the_same_from_the_same_file(
        self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--profile", "none", "--parts", "retrieval", "--json") == 0
        report: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert set(report) & {"agreement", "attention"} == set()
        once, again = (figures.draw(report, tmp_path / name) for name in ("once", "again"))
        assert [file.read_text() for file in once] == [file.read_text() for file in again]

    def test_a_missing_profile_is_refused_with_the_ways_out(
        self, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--parts", "retrieval") == 1
        said = capsys.readouterr().err
        assert "no profile comes with the package for the model" in said
        assert "--profile none --tau 0.004" in said
        assert run("--profile", str(tmp_path / "none.json")) == 1
        assert "No such file or directory" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--tokens", "-10"), "--tokens -10: must be at least 1"),
            (("--documents", "11"), "--documents 11: there are 10; name files with --text"),
            (("--text", "nowhere.txt"), "--text nowhere.txt: no such file"),
            (("--haystack", "nowhere.txt"), "--haystack nowhere.txt: no such file"),
            (("--output", "nowhere/report.json"), "there is no folder nowhere; make it first"),
        ],
    )
    def test_what_cannot_work_is_refused_before_anything_is_measured(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: tuple[str, str], message: str
    ) -> None:
        assert run("--profile", "none", *arguments) == 1
        assert message in capsys.readouterr().err

    def test_a_threshold_beside_a_profile_is_refused(
        self, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--tau", "0.01") == 1
        assert "--tau and --query-stride go with --profile none" in capsys.readouterr().err


class TestCodeHash:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        file = tmp_path / "server" / "sale_attention" / "select.py"
        file.parent.mkdir(parents=True)
        file.write_text('"""What is kept."""\n# how it is done\nkeep = score > limit\n')
        return tmp_path

    def test_code_and_profile_change_it(self, root: Path) -> None:
        before = fidelity_retrieval.code_hash("profile", "cpu", root)
        assert before != fidelity_retrieval.code_hash("another profile", "cpu", root)
        (root / "server" / "sale_attention" / "select.py").write_text("keep = score >= limit\n")
        assert before != fidelity_retrieval.code_hash("profile", "cpu", root)

    def test_kernels_of_the_device_that_made_it_count(self, root: Path) -> None:
        before = {device: fidelity_retrieval.code_hash("profile", device, root) for device in ("cpu", "a GPU")}
        (root / "csrc" / "cuda").mkdir(parents=True)
        (root / "csrc" / "cuda" / "select.cu").write_text("int kept;")
        assert before["cpu"] == fidelity_retrieval.code_hash("profile", "cpu", root)
        assert before["a GPU"] != fidelity_retrieval.code_hash("profile", "a GPU", root)

    def test_comment_lines_and_docstrings_do_not(self, root: Path) -> None:
        before = fidelity_retrieval.code_hash("profile", "cpu", root)
        (root / "server" / "sale_attention" / "select.py").write_text("# better said\n\nkeep = score > limit\n")
        assert before == fidelity_retrieval.code_hash("profile", "cpu", root)


def _alone(model: FidelityModel, prompt_ids: tuple[int, ...], candidate: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt_ids, *candidate]])
    with torch.inference_mode(), attention_context(DENSE):
        likelihoods = model.module(input_ids=ids).logits[0].float().log_softmax(-1)
    rows = range(len(prompt_ids) - 1, ids.shape[1] - 1)
    return sum(float(likelihoods[row, token]) for row, token in zip(rows, candidate, strict=True))
