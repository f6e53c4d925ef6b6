"""Peak memory and time of loading a base-size checkpoint whole, and at each of its exits.

    python benchmarks/loading.py

Random weights of the released base model (12 layers, hidden 768, vocabulary 250,002) are saved once; each load runs
in a process of its own, which then reads every parameter. Its peak resident memory above that of the imports is
compared with the size of the loaded parameters; hooks count the layers that one forward pass runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from m3bert_hf import M3BertConfig, M3BertModel


LOAD = """
import json, sys, time, resource, torch
from m3bert_hf import M3BertConfig, M3BertModel
import tempfile
# A first small load brings in everything that loading imports.
with tempfile.TemporaryDirectory() as small:
    tiny = M3BertConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    M3BertModel(tiny).save_pretrained(small)
    M3BertModel.from_pretrained(small)
status = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
model = M3BertModel.from_pretrained(sys.argv[1], **json.loads(sys.argv[2]))
seconds = time.perf_counter() - start
# The file is mapped and read on first use: without this, next to nothing would have been loaded.
for parameter in model.parameters():
    parameter.detach().sum()
ran = []
for i, layer in enumerate(model.layers):
    layer.register_forward_hook(lambda *_, i=i: ran.append(i))
peak = status("VmHWM") - before
with torch.inference_mode():
    model(torch.arange(16)[None])
print(json.dumps({"peak": peak, "size": sum(p.nbytes for p in model.parameters()), "seconds": seconds,
                  "layers_run": len(ran)}))
"""


def main() -> None:
    """Save, load in every way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        M3BertModel(M3BertConfig()).save_pretrained(directory)
        time.sleep(1)
        for name, arguments in (
            ("whole", {}),
            ("exit_layer=8", {"exit_layer": 8}),
            ("exit_layer=4", {"exit_layer": 4}),
            ("num_hidden_layers=4", {"num_hidden_layers": 4}),
        ):
            command = [sys.executable, "-c", LOAD, directory, json.dumps(arguments)]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            figures.append({"load": name, **json.loads(result.stdout.splitlines()[-1])})
    print("| load | parameters, MiB | peak, MiB | peak / parameters | seconds | layers run |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for f in figures:
        print(
            f"| {f['load']} | {f['size'] / 2**20:.0f} | {f['peak'] / 2**20:.0f} | {f['peak'] / f['size']:.2f} | "
            f"{f['seconds']:.2f} | {f['layers_run']} |"
        )
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
