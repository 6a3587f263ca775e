"""The shard writer against a webdataset read-and-write loop and against cp, in turn on the same shards.

python docs/benchmarks/writer.py RUN [--repeats 5]     RUN: the run folder of a scan of local .tar shards
"""

import argparse
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import webdataset as wds

from sanitize.config import ScanConfig
from sanitize.corpus import writer
from sanitize.pipeline import cores, find_sources
from sanitize.progress import Silent
from sanitize.rundir import RunDir


def webdataset_loop(paths, flagged, out):
    """What one would write by hand: read every sample, write it to one of two shards."""
    row = 0
    for path in paths:
        samples = wds.WebDataset([str(path)], shardshuffle=False, empty_check=False)
        with (
            wds.TarWriter(str(out / f"kept-{path.name}")) as kept,
            wds.TarWriter(str(out / f"quarantine-{path.name}")) as quarantine,
        ):
            for sample in samples:
                members = {k: v for k, v in sample.items() if not k.startswith("__") or k == "__key__"}
                (quarantine if flagged[row] else kept).write(members)
                row += 1


def _unverified(written, content, keys, scratch):
    return writer.Verified(1, "", len(content.starts))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with RunDir.open(arguments.run) as run:
        config = ScanConfig.from_dict(run.manifest["config"])
    corpus, _ = find_sources(config.corpus)
    table = pq.read_table(arguments.run / "index.parquet")
    flagged = pq.read_table(arguments.run / "decisions.parquet")["flagged"].to_numpy(zero_copy_only=False)
    paths = [Path(source.url) for source in corpus]
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    seconds: dict[str, list[float]] = {}
    verify = writer.verify_shard

    def write(folder, workers):
        writer.write_shards(
            corpus, table, np.asarray(flagged), folder, scratch=folder, workers=workers, progress=Silent()
        )

    for _ in range(arguments.repeats):
        for name in ("cp", "copy only, 1 process", "copy and verify, 1 process",
                     f"copy and verify, {cores()} processes", "webdataset loop"):  # fmt: skip
            folder = Path(tempfile.mkdtemp(dir=arguments.run))
            writer.verify_shard = _unverified if name.startswith("copy only") else verify
            began = time.perf_counter()
            if name == "cp":
                subprocess.run(["cp", *map(str, paths), str(folder)], check=True)
            elif name == "webdataset loop":
                webdataset_loop(paths, flagged, folder)
            else:
                write(folder, cores() if str(cores()) + " proc" in name else 1)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
            shutil.rmtree(folder)
    loop = seconds["webdataset loop"]
    for name, values in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(values, loop, strict=True))
        median = statistics.median(values)
        print(
            f"{name:<32}{median:7.2f} s ({min(values):.2f}-{max(values):.2f})"
            f"{megabytes / median:9.0f} MB/s   {ratio:5.1f} x the loop"
        )


if __name__ == "__main__":
    main()
