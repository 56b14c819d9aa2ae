from __future__ import annotations

import numpy as np
import pytest
import torch
from store_data import VECTORS, rows_of, spec

from pyinf.errors import ConfigError, NonFiniteError
from pyinf.store.prefilter import EmbeddingPrefilter
from pyinf.store.reader import Store
from pyinf.store.retrieve import query_store
from pyinf.store.scan import all_scores, scan
from pyinf.store.sections import query_width, section_scores
from pyinf.store.writer import StoreWriter

N, Q, K = 600, 5, 10


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A one-bit store of ``N`` rows, queries, and the scores of the rows as they were before they were rounded."""
    what = spec("1bit", VECTORS)
    rows = rows_of(what, N)
    rows[:40] *= 4
    directory = tmp_path_factory.mktemp("retrieve") / "store"
    ids = np.random.default_rng(0).permutation(2 * N)[:N]
    with StoreWriter(directory, what, shard_rows=250) as writer:
        documents = [{"number": int(i)} for i in ids]
        writer.append(ids, rows, rows.norm(dim=1), documents)
    queries = torch.randn(Q, query_width(what.sections), generator=torch.Generator().manual_seed(5))
    return Store.open(directory), queries, section_scores(queries.double(), rows.double(), what.sections)


class Exact:
    """A rescorer out of a matrix, which remembers what it was asked."""

    def __init__(self, scores, costs=(1.0, 0.0), together=False):
        self.scores, self.costs, self.together = scores, costs, together
        self.calls, self.certificates = [], {}

    def __call__(self, queries, rows):
        self.calls.append((tuple(queries), tuple(rows)))
        self.certificates |= {q: {"query": q} for q in queries}
        return self.scores[list(queries)][:, list(rows)]


def recall_of(found, exact, k=K):
    best = exact.topk(k, dim=1).indices
    return np.mean([np.isin(best[q], found.rows[q]).mean() for q in range(len(exact))])


def test_the_scan_alone(data):
    store, queries, _ = data
    found = query_store(store, queries, K)
    scores = all_scores(store, queries)
    assert torch.equal(found.rows, scores.topk(K, dim=1).indices)
    torch.testing.assert_close(found.values, scores.topk(K, dim=1).values)
    assert torch.equal(found.ids, torch.as_tensor(store.ids)[found.rows])
    assert found.documents[2][3] == {"number": int(found.ids[2, 3])}
    assert found.recall is None and found.certificate is None and found.cost["scanned"] == N


@pytest.mark.parametrize(("costs", "strategy"), [((1.0, 0.0), "together"), ((0.0, 1.0), "alone")])
def test_rescored_candidates_are_in_exact_order(data, costs, strategy):
    store, queries, exact = data
    rescorer = Exact(exact, costs)
    found = query_store(store, queries, K, rescorer, rescore=60, sample=100)
    candidates = all_scores(store, queries).topk(60, dim=1).indices
    own = exact.gather(1, candidates)
    order = own.topk(K, dim=1).indices
    torch.testing.assert_close(found.values, own.gather(1, order))
    assert torch.equal(found.rows, candidates.gather(1, order))
    torch.testing.assert_close(found.stage1, all_scores(store, queries).gather(1, found.rows))
    assert found.certificate == [{"query": q} for q in range(Q)]
    assert found.cost["strategy"] == strategy and found.cost["candidates"] == 60 and found.cost["share"] == 0.1
    runs = rescorer.calls[1:]  # the first call is the sample
    assert len(rescorer.calls[0][1]) == 100
    if strategy == "together":
        assert len(runs) == 1 and runs[0][0] == tuple(range(Q)) and len(set(runs[0][1])) == len(runs[0][1])
        assert not set(runs[0][1]) & set(rescorer.calls[0][1])  # what the sample had run is not run again
    else:
        assert [q for q, _ in runs] == [(q,) for q in range(Q)]
    assert found.cost["sequences_run"] == sum(len(rows) for _, rows in rescorer.calls)
    assert found.recall.low <= recall_of(found, exact) <= found.recall.high
    assert found.recall.sample == 100 and found.recall.cut == 60 and found.recall.k == K


def test_a_coarse_scan_only_chooses_the_candidates(data):
    """Signs of the queries pick the candidates; their scores and the stated recall are as exact as ever."""
    store, queries, exact = data
    rows = scan(store, queries, 60, coarse="sign")[1]
    assert not torch.equal(rows, scan(store, queries, 60)[1])
    found = query_store(store, queries, K, Exact(exact), rescore=60, sample=N, coarse="sign")
    order = exact.gather(1, rows).argsort(dim=1, descending=True, stable=True)[:, :K]
    assert torch.equal(found.rows, rows.gather(1, order))
    assert found.recall.value == pytest.approx(recall_of(found, exact))
    prefilter = EmbeddingPrefilter(torch.randn(Q, 3), torch.randn(N, 3))
    with pytest.raises(ConfigError, match="one of the two"):
        query_store(store, queries, K, Exact(exact), rescore=60, sample=N, coarse="sign", prefilter=prefilter)


def test_a_solver_gets_all_queries_at_once(data):
    store, queries, exact = data
    rescorer = Exact(exact, (0.0, 1.0), together=True)
    query_store(store, queries, K, rescorer, rescore=30, sample=50)
    assert all(asked == tuple(range(Q)) for asked, _ in rescorer.calls)


def test_a_sample_of_everything_states_the_true_recall(data):
    store, queries, exact = data
    for cut in (K, 25, 120):
        found = query_store(store, queries, K, Exact(exact), rescore=cut, sample=N)
        assert found.recall.value == pytest.approx(recall_of(found, exact), abs=1e-12)
    assert recall_of(found, exact) > 0.9


def test_the_cut_for_a_recall(data):
    store, queries, exact = data
    found = query_store(store, queries, K, Exact(exact), recall=0.9, sample=N, most=1.0 - 1e-9)
    assert found.recall.low >= 0.9 and recall_of(found, exact) >= 0.9
    smaller = query_store(store, queries, K, Exact(exact), rescore=int(found.cost["candidates"] / 1.5), sample=N)
    assert smaller.recall.low < 0.9  # the step before did not reach it
    with pytest.raises(ConfigError, match=r"does not reach 0\.95; raise most="):
        query_store(store, queries, K, Exact(exact), recall=0.95, sample=N, most=12)
    with pytest.raises(ConfigError, match=r"larger sample \(now 12 of 600\)"):
        query_store(store, queries, K, Exact(exact), recall=0.5, sample=12, most=0.5)
    by_value = query_store(store, queries, K, Exact(exact), recall=0.5, sample=12, most=0.5, recall_by="value")
    assert by_value.recall.value >= 0.5 > by_value.recall.low


def test_growing_does_not_run_a_sequence_twice(data):
    store, queries, exact = data
    rescorer = Exact(exact)
    found = query_store(store, queries, K, rescorer, recall=0.95, sample=N // 2, most=0.9, recall_by="value")
    assert found.cost["candidates"] > K  # several steps
    run = [row for _, rows in rescorer.calls for row in rows]
    assert len(run) == len(set(run))
    alone = Exact(exact, (0.0, 1.0))
    query_store(store, queries, K, alone, recall=0.95, sample=N // 2, most=0.9, recall_by="value")
    pairs = [(q, row) for asked, rows in alone.calls for q in asked for row in rows]
    assert len(pairs) == len(set(pairs))


def test_a_prefilter_and_its_recall(data):
    store, queries, exact = data
    noisy = exact + 1.0 * exact.std() * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    rows = torch.linalg.svd(noisy, full_matrices=False)  # embeddings whose products are the noisy scores
    prefilter = EmbeddingPrefilter(rows.U * rows.S, rows.Vh.T)
    found = query_store(store, queries, K, Exact(exact), rescore=40, sample=N, prefilter=prefilter, keep=60)
    allowed = prefilter.top(60)
    own = all_scores(store, queries).gather(1, allowed)
    candidates = allowed.gather(1, own.topk(40, dim=1).indices)
    for q in range(Q):
        inside = candidates[q][exact[q, candidates[q]].topk(K).indices]
        assert set(found.rows[q].tolist()) == set(inside.tolist())
    best = exact.topk(K, dim=1).indices
    kept = np.mean([np.isin(best[q], allowed[q]).mean() for q in range(Q)])
    assert found.prefilter.value == pytest.approx(kept, abs=1e-12) and kept < 1
    assert found.recall.value == pytest.approx(recall_of(found, exact), abs=1e-12)
    assert found.recall.value <= found.prefilter.value
    assert found.cost["scanned"] == len(allowed.unique()) < N


def test_rows_divided_by_their_norms(data):
    store, queries, exact = data
    prefilter = EmbeddingPrefilter(torch.ones(Q, 2), torch.ones(N, 2))
    plain = query_store(store, queries, K, Exact(exact), rescore=50, sample=20, normalise="norm")
    kept = query_store(
        store, queries, K, Exact(exact), rescore=50, sample=20, normalise="norm", prefilter=prefilter, keep=N
    )
    assert torch.equal(plain.rows, kept.rows)
    torch.testing.assert_close(plain.stage1, kept.stage1)
    assert not torch.equal(plain.rows, query_store(store, queries, K, Exact(exact), rescore=50, sample=20).rows)


def test_without_a_measured_recall(data):
    store, queries, exact = data
    rescorer = Exact(exact)
    found = query_store(store, queries, K, rescorer, rescore=0.05, sample=0)
    assert found.recall is None and found.cost["recall_measured"] is False and len(rescorer.calls) == 1
    assert found.to_dict()["recall"] is None and found.cost["candidates"] == 30


def test_errors(data):
    store, queries, exact = data
    prefilter = EmbeddingPrefilter(torch.ones(Q, 2), torch.ones(N, 2))
    with pytest.raises(ConfigError, match="k is 601"):
        query_store(store, queries, N + 1)
    with pytest.raises(ConfigError, match="needs exact scores"):
        query_store(store, queries, K, rescore=0.1)
    with pytest.raises(ConfigError, match="never used without measuring"):
        query_store(store, queries, K, prefilter=prefilter)
    for options in ({}, {"rescore": 0.1, "recall": 0.9}):
        with pytest.raises(ConfigError, match="one of them"):
            query_store(store, queries, K, Exact(exact), **options)
    with pytest.raises(ConfigError, match="sample must not be 0"):
        query_store(store, queries, K, Exact(exact), recall=0.9, sample=0)
    with pytest.raises(ConfigError, match="sample must not be 0"):
        query_store(store, queries, K, Exact(exact), rescore=0.1, sample=0, prefilter=prefilter)
    for value in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="share below 1 or a number"):
            query_store(store, queries, K, Exact(exact), rescore=value)
    with pytest.raises(ConfigError, match="the prefilter ranks 3 rows"):
        other = EmbeddingPrefilter(torch.ones(Q, 2), torch.ones(3, 2))
        query_store(store, queries, K, Exact(exact), rescore=0.1, prefilter=other)
    with pytest.raises(ConfigError, match="keep more"):
        query_store(store, queries, K, Exact(exact), rescore=100, prefilter=prefilter, keep=50)
    with pytest.raises(NonFiniteError, match="exact score is not finite"):
        query_store(store, queries, K, Exact(exact * float("nan")), rescore=0.1)
    with pytest.raises(ConfigError, match="no query"):
        query_store(store, queries[:0], K)
