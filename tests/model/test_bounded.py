"""Chat templates that would take all memory or all time."""

import resource
import signal

import pytest

from derm_compress.errors import DermError
from derm_compress.model import bounded, loading, prompts

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
DOUBLED = "{% set x = namespace(s='aaaa') %}{% for i in range(99) %}{% set x.s = x.s ~ x.s %}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (f"{LOOPS}x{3 * '{% endfor %}'}", "chat template: it takes more than"),
        (f"{LOOPS}{3 * '{% endfor %}'}", "chat template: it takes more than 0.2 s"),
        (f"{DOUBLED}{{% endfor %}}", "chat template: it takes more than 1024 MiB of memory"),
        ("{{ messages[0].role * 10**11 }}", "chat template: it takes more than 1024 MiB"),
        ("{{ '%99999999999d' % 1 }}", "chat template: it takes more than 1024 MiB"),
        ("{{ 'a' | center(10**11) }}", "chat template: it takes more than 1024 MiB"),
    ],
)
def test_a_template_ends_in_one_line(monkeypatch, template, said):
    monkeypatch.setattr(bounded, "SECONDS", 0.2 if "range(99999)" in template else 5)
    _, processor = loading.check_model("tiny")
    processor.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(DermError, match=said):
        prompts.ask(processor, "Why?")
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM))
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0
