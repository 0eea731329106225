"""The check of `make check` that no code here runs what it reads: it finds what it is there to find."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent.parent / ".ci" / "check_code.py"


@pytest.fixture(scope="module")
def check_code():
    spec = importlib.util.spec_from_file_location("check_code", CHECK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_code"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_code"]


BAD = {
    "pickle": "import pickle\npickle.loads(data)",
    "pickle, renamed": "import pickle as p",
    "pickle, from": "from pickle import loads as read",
    "C pickle": "import _pickle, cPickle",
    "unpickler": "from somewhere import io_tools\nio_tools.Unpickler(file).load()",
    "unpickler by name": "getattr(tools, 'Unpickler')(file)",
    "marshal": "from marshal import load",
    "shelve": "def f():\n    import shelve",
    "dill": "import dill",
    "joblib": "import joblib",
    "eval": "eval(text)",
    "eval, handed on": "list(map(eval, texts))",
    "eval, by its module": "import builtins\nbuiltins.eval(text)",
    "exec": "exec(text)",
    "compile": "compile(text, 'x', 'exec')",
    "__import__": "__import__(name)",
    "import by name": "import importlib\nimportlib.import_module(name)",
    "import by name, renamed": "from importlib import import_module as get\nget(name)",
    "entry points": "from importlib.metadata import entry_points\nentry_points(group='x')",
    "import of a file": "import importlib.util\nimportlib.util.spec_from_file_location('x', path)",
    "numpy.load": "import numpy as np\nnp.load(file)",
    "numpy.load with pickles": "import numpy as np\nnp.load(file, allow_pickle=True)",
    "numpy.load, perhaps": "from numpy import load\nload(file, allow_pickle=flag)",
    "numpy.load, handed on": "import numpy as np\nopener = np.load",
    "pickles elsewhere": "read_array(file, allow_pickle=True)",
    "torch.load": "import torch\ntorch.load(file)",
    "torch.load, said to be safe": "import torch\ntorch.load(file, weights_only=True)",
    "torch.load, renamed": "from torch import load as fetch\nfetch(file)",
    "torch.hub": "import torch\ntorch.hub.load('a/b', 'c')",
    "weights that are more": "helper(file, weights_only=False)",
    "remote code": "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "yaml": "import yaml\nyaml.load(text)",
    "os.system": "import os\nos.system(command)",
    "os.popen": "from os import popen\npopen(command)",
    "shell": "import subprocess\nsubprocess.run(command, shell=True)",
    "shell, perhaps": "run(command, shell=flag)",
    "getoutput": "import subprocess\nsubprocess.getoutput(command)",
    "mktemp": "import tempfile\ntempfile.mktemp()",
    "faiss reads a file": "import faiss\nfaiss.read_index(path)",
}


@pytest.mark.parametrize("source", BAD.values(), ids=BAD)
def test_it_finds(check_code, source):
    assert check_code.check(source, "memodb/module.py") != []


GOOD = {
    "a regular expression": "import re\nre.compile('x')",
    "a compiled model": "import torch\ntorch.compile(model)",
    "a model for evaluation": "model.eval()",
    "arrays": "import numpy as np\nnp.load(file, allow_pickle=False)",
    "json": "import json\njson.load(file)",
    "a program": "import subprocess\nsubprocess.run(['true'], check=True, shell=False)",
    "one's own function": "from memodb.names import compile\ncompile(1)",
    "a method of that name": "self.exec(text)",
    "an index in memory": "import faiss\nfaiss.deserialize_index(checked)",
}


@pytest.mark.parametrize("source", GOOD.values(), ids=GOOD)
def test_it_leaves_alone(check_code, source):
    assert check_code.check(source, "memodb/module.py") == []


def test_what_is_allowed_is_allowed_in_its_place_only(check_code):
    source = "from importlib import import_module\nimport_module(name)"
    assert check_code.check(source, "memodb/backends/registry.py") == []
    assert check_code.check(source, "memodb/backends/arena.py") != []


def test_the_tree_is_clean_and_every_exception_is_needed(check_code, monkeypatch, capsys):
    assert check_code.main([check_code.ROOT / folder for folder in check_code.FOLDERS]) == 0
    allowed = check_code.ALLOWED
    monkeypatch.setattr(check_code, "ALLOWED", {})
    capsys.readouterr()
    assert check_code.main([check_code.ROOT / folder for folder in check_code.FOLDERS]) == 1
    printed = capsys.readouterr().out
    assert all(f"{file}:" in printed and f" {what}: " in printed for file, what in allowed)


def test_a_finding_names_the_line(check_code):
    (found,) = check_code.check("import os\n\nos.system('ls')", "demo/x.py")
    assert (found.file, found.line, found.what) == ("demo/x.py", 3, "os.system")
