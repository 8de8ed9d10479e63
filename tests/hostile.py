"""Values that have broken launchers before; every string field meets all of them."""

HOSTILE = [
    "$(touch canary)", "`touch canary`", "; touch canary", "&& touch canary", "| touch canary", "> canary", "x\ntouch canary",
    "x\r\ntouch canary", "'", '"', "''", '""', "'; touch canary; '", '"; touch canary; "', "a'b\"c", "\\", "a\\", "\\'", "a b",
    "  lead and trail  ", "#", "a #b", "%", "%j", "100%%", "$HOME", "${HOME}", "$((1+1))", "~", "~root", "*", "?", "[a]", "{a,b}", "!",
    "!!", "-x", "--wrap=touch canary", "-", "é", "日本語", "🚀", "\u202e", "\u200b", "a\tb", "\x00", "a\x00b", "\x1b[31m", "\x07", "\u2028",
    "\ud800", "x" * 10_000, "x" * 10_001, "<<EOF", "TASK", "TASK\ntouch canary", "$'\\ntouch canary'", "../../etc/passwd", "/dev/null",
    "null", "true", "1e3", "0x10", "{{ 7*7 }}", "{% raw %}", "{## x ##}", "#SBATCH --wrap=id", "a=b", "=", ",", "a,b", ":", "a:b", "@", "\u00a0",
]  # fmt: skip
