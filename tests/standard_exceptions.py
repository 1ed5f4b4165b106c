"""Every exception class of Python and its standard library, each with arguments that make one."""

import contextlib
import importlib
import inspect
import sys
import warnings

MODULES = [
    "argparse",
    "array",
    "ast",
    "asyncio",
    "base64",
    "binascii",
    "bz2",
    "calendar",
    "codecs",
    "code",
    "compileall",
    "concurrent.futures",
    "configparser",
    "contextlib",
    "contextvars",
    "copy",
    "csv",
    "ctypes",
    "dataclasses",
    "datetime",
    "dbm",
    "decimal",
    "doctest",
    "email.errors",
    "encodings.idna",
    "enum",
    "fractions",
    "ftplib",
    "getopt",
    "getpass",
    "glob",
    "gzip",
    "hashlib",
    "heapq",
    "http.client",
    "http.cookiejar",
    "http.cookies",
    "imaplib",
    "importlib.metadata",
    "importlib.resources",
    "inspect",
    "ipaddress",
    "json",
    "linecache",
    "locale",
    "logging",
    "lzma",
    "mailbox",
    "math",
    "mmap",
    "multiprocessing",
    "multiprocessing.managers",
    "multiprocessing.shared_memory",
    "netrc",
    "nturl2path",
    "numbers",
    "operator",
    "optparse",
    "pathlib",
    "pdb",
    "pickle",
    "pickletools",
    "pkgutil",
    "platform",
    "plistlib",
    "poplib",
    "pprint",
    "profile",
    "py_compile",
    "pyclbr",
    "queue",
    "quopri",
    "re",
    "sched",
    "secrets",
    "select",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "signal",
    "smtplib",
    "socket",
    "socketserver",
    "sqlite3",
    "ssl",
    "stat",
    "statistics",
    "string",
    "stringprep",
    "struct",
    "subprocess",
    "symtable",
    "tabnanny",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "tomllib",
    "trace",
    "traceback",
    "tracemalloc",
    "types",
    "typing",
    "unicodedata",
    "unittest",
    "unittest.case",
    "unittest.mock",
    "urllib.error",
    "urllib.parse",
    "urllib.request",
    "urllib.robotparser",
    "uuid",
    "venv",
    "warnings",
    "wave",
    "weakref",
    "webbrowser",
    "xml.dom",
    "xml.etree.ElementTree",
    "xml.parsers.expat",
    "xml.sax",
    "xmlrpc.client",
    "zipapp",
    "zipfile",
    "zipimport",
    "zlib",
    "zoneinfo",
    "numpy.linalg",
    "numpy.exceptions",
]

ARGUMENTS = (
    ("text",),
    (),
    (2, "no such file", "a.txt"),
    ("utf-8", b"ab\xff", 2, 3, "invalid start byte"),
    ("ascii", "ab\xe9", 2, 3, "ordinal not in range"),
    ("ab\xe9", 2, 3, "cannot translate"),
    ("group", [ValueError("v")]),
    ("group", [KeyboardInterrupt("k")]),
    (1, "command"),
    ("a", "b"),
    ("a", "b", "c"),
    ("a", "b", "c", "d"),
    (b"ab", 5),
    ("text", "document", 1),
    ("file.cfg", 3, "line"),
    (None, "text"),
)
ARGUMENTS_OF = {"HTTPError": ("http://host", 404, "not found", {}, None)}


def standard_exceptions():
    """Return the classes by their names, with arguments for which their constructor runs and prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    found = {}
    for kind in [BaseException, *_subclasses(BaseException, set())]:
        root = kind.__module__.partition(".")[0]
        if (root in sys.stdlib_module_names or root == "numpy") and _is_importable(kind):
            arguments = _arguments(kind)
            if arguments is not None:
                found[f"{kind.__module__}.{kind.__qualname__}"] = kind, arguments
    return dict(sorted(found.items()))


def _subclasses(kind, seen):
    for each in type.__subclasses__(kind):
        if each not in seen:
            seen.add(each)
            _subclasses(each, seen)
    return seen


def _is_importable(kind):
    return (
        "<" not in kind.__qualname__
        and inspect.getattr_static(sys.modules.get(kind.__module__), kind.__qualname__, None) is kind
    )


def _arguments(kind):
    own = ARGUMENTS_OF.get(kind.__name__)
    for arguments in ARGUMENTS if own is None else [own]:
        with contextlib.suppress(Exception):
            error = kind(*arguments)
            str(error), repr(error)
            if type(error) is kind:
                return arguments
    return None
