import time

from dq_plugins.evaluation import compare_latency


def test_rounds_are_interleaved_and_ordered_by_cost() -> None:
    order = []

    def call(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    result = compare_latency({"slow": call("slow", 0.02), "fast": call("fast", 0.0)}, rounds=3, warmup=1)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(rounds) == 5
    assert all(set(each) == {"slow", "fast"} for each in rounds)
    assert result["fast"].median < result["slow"].median
    assert len({tuple(each) for each in rounds}) == 2  # neither always runs after the other
    assert result["slow"].low <= result["slow"].median <= result["slow"].high
