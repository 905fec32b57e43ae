"""seats.py and seat_costs.py: the benchmark of seats measures what it says."""

import pytest
import seat_costs
import seats
from measuring import Stores
from seats import Bench


@pytest.fixture
def bench(stores, tmp_path, monkeypatch):
    """A small run."""
    for name, number in {"PEOPLE": 8, "ATTEMPTS": 8, "MOVERS": 3, "TURNS": 4}.items():
        monkeypatch.setattr(seats, name, number)
    for name, number in {"SEATS": 60, "REPEATS": 5, "SEARCH_PAUSE": 0}.items():
        monkeypatch.setattr(seat_costs, name, number)
    bench = Bench(tmp_path, None, 1)
    bench.use(Stores(stores.dsn, stores.redis_url, stores.data_dir / "postgresql.log"))
    return bench


def test_the_nodes_that_read_a_change_are_counted_and_a_storm_is_checked(bench):
    with bench._running(3) as nodes:
        # Redis also answers the pings of the nodes, and how many there are depends on the time that all takes.
        (*counted, reads, _) = bench._reads(nodes, is_before=False)
        assert (counted, float(reads)) == (["3", "2"], pytest.approx(2, rel=0.1))
        # On the channel of all nodes, as in the older working tree.
        (*counted, reads, _) = bench._reads(nodes, is_before=True)
        assert (counted, float(reads)) == (["3 before", "3"], pytest.approx(3, rel=0.1))
        rate, cpu, _, _, changes = bench._storm_on(nodes[:2])
        assert min(rate, cpu, changes) > 0


def test_the_costs_of_scripts_tell_which_of_them_read_the_whole_map(bench):
    reads = {(state, call): int(number) for state, call, _, _, number in bench.tables()["map"][1]()}
    assert [call for call, number in reads.items() if number] == [("half full, by another program", "take")]
