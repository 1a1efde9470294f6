//! Templates that mean harm: each must end soon with an error, on a thread with the usual 2 MiB of stack.

use serde_json::json;
use servelab_text::{ChatInput, ChatTemplate, TextError};

fn outcome(source: &str) -> Result<String, TextError> {
    let messages = [json!({"role": "user", "content": "hello"})];
    let template = ChatTemplate::new(source, None, None)?;
    template.render(&ChatInput { messages: &messages, ..ChatInput::default() })
}

/// 30 doublings are a gigabyte, 60 an exabyte.
fn doubling(start: &str, twice: &str) -> String {
    format!(
        "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {twice} %}}{{% endfor %}}{{{{ ns.x|length }}}}"
    )
}

#[track_caller]
fn assert_limited(source: &str) {
    match outcome(source) {
        Err(TextError::TemplateLimit { .. }) => {}
        other => panic!("{source}\ngave {:?}", other.map(|text| text.len())),
    }
}

#[test]
fn endless_loops_run_out_of_fuel() {
    let nested = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}";
    assert_limited(nested);
    assert!(outcome("{% for a in range(1000000000) %}{% endfor %}").is_err());
}

#[test]
fn endless_recursion_ends() {
    assert_limited("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}");
    assert_limited(
        "{% macro f(n) %}{{ g(n) }}{% endmacro %}{% macro g(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}",
    );
    assert!(outcome("{% include 'chat_template' %}").is_err());
    assert!(outcome("{% extends 'chat_template' %}").is_err());
    assert!(outcome("{% import 'chat_template' as x %}").is_err());
    let deep = format!("{}{}", "{% if true %}".repeat(5000), "{% endif %}".repeat(5000));
    assert!(outcome(&deep).is_err());
    assert!(outcome(&format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000))).is_err());
    assert!(outcome(&format!("{{{{ {}1{} }}}}", "[".repeat(50_000), "]".repeat(50_000))).is_err());
}

#[test]
fn long_chains_of_operators_do_not_overflow_the_stack() {
    // Valid Jinja, within the bound on the source: any result will do, but not the end of the process.
    for (operator, count) in
        [("not ", 3_000), ("-", 3_000), ("1+", 3_000), ("'a'~", 3_000), ("1 if 1 else ", 900)]
    {
        let _either = outcome(&format!("{{{{ {}1 }}}}", operator.repeat(count)));
        let _either = outcome(&format!("{{{{ messages|length + {}1 }}}}", operator.repeat(count)));
    }
    for (link, count) in
        [("|string", 1_500), (".a", 6_000), ("[0]", 4_000), (" == 1", 2_000), (" and 1", 2_000)]
    {
        let _either = outcome(&format!("{{{{ messages{} }}}}", link.repeat(count)));
    }
    let _either = outcome(&format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(1_000)));
    assert!(outcome(&"x".repeat(200_000)).is_err());
}

/// Each would take minutes to compile.
#[test]
fn endless_expressions_are_refused() {
    for link in ["messages ~ ", "messages or ", "not ", "1 + ", "'' ~ "] {
        let source = format!("{{{{ {}1 }}}}", link.repeat(10_000));
        let error = outcome(&source).unwrap_err().to_string();
        assert!(error.contains("one of its expressions has"), "{link}: {error}");
    }
    // Texts do not count, nor does what looks like the end of the expression within one.
    let prompt = "You are a 'helpful' }} assistant. ".repeat(1_000);
    assert_eq!(outcome(&format!("{{{{ \"{prompt}\" }}}}")).unwrap(), prompt);
}

#[test]
fn a_template_of_one_long_text_is_fine() {
    assert_eq!(outcome(&"x".repeat(100_000)).unwrap().len(), 100_000);
}

#[test]
fn doubling_a_value_reaches_a_bound() {
    for (start, twice) in [
        ("'x'", "ns.x ~ ns.x"),
        ("'x'", "ns.x + ns.x"),
        ("'x'", "ns.x * 2"),
        ("'x'", "[ns.x, ns.x]|join"),
        ("'x'", "'' ~ ns.x.replace('x', 'xx')"),
        ("'x'", "ns.x|replace('x', 'xx')"),
        ("'x'", "','.join([ns.x, ns.x])"),
        ("'x'", "'{}{}'.format(ns.x, ns.x)"),
        ("'x'", "'%s%s'|format(ns.x, ns.x)"),
        ("[1]", "ns.x + ns.x"),
        ("[1]", "ns.x * 2"),
        ("[1]", "[ns.x, ns.x]"),
        ("(1,)", "(ns.x, ns.x)"),
        ("{'a': 1}", "{'a': ns.x, 'b': ns.x}"),
        ("{'a': 1}", "dict(a=ns.x, b=ns.x)"),
        ("'\"'", "ns.x|tojson"),
    ] {
        assert_limited(&doubling(start, twice));
    }
    let captured = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}";
    assert_limited(captured);
    let macros = "{% macro f(x, n) %}{% if n > 0 %}{{ f(x ~ x, n - 1) }}{% else %}{{ x|length }}{% endif %}{% endmacro %}{{ f('x' * 1000, 30) }}";
    assert_limited(macros);
}

#[test]
fn output_is_bounded_wherever_it_goes() {
    let raw = "x".repeat(100_000);
    assert_limited(&format!("{{% for i in range(100000) %}}{raw}{{% endfor %}}"));
    assert_limited(&format!("{{% set y %}}{{% for i in range(100000) %}}{raw}{{% endfor %}}{{% endset %}}"));
    assert_limited(&format!(
        "{{% set s = '{raw}' %}}{{% for i in range(100000) %}}{{{{ s }}}}{{% endfor %}}"
    ));
}

#[test]
fn single_operations_are_bounded() {
    for source in [
        "{{ 'x' * 1000000000 }}",
        "{{ ([1] * 1000000000)|length }}",
        "{{ '%0999999999d'|format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ ('x' * 10000000)|list|length }}",
        "{{ ('x' * 10000000).split('x')|length }}",
        "{{ ('x' * 10000000).replace('', 'y' * 100000)|length }}",
        "{{ ('\\n' * 10000000).splitlines()|length }}",
        "{{ 'a\\nb'|indent(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
    ] {
        assert_limited(source);
    }
    assert!(outcome("{{ [1]|tojson(indent=1000000000) }}").is_err());
    assert!(outcome("{{ strftime_now('%999999999d') }}").is_err());
    assert!(outcome("{{ 2 ** 100000000000 }}").is_err());
}

#[test]
fn work_without_a_result_is_bounded() {
    let big = "{% set big = 'x' * 10000000 %}{% set other = 'x' * 9999999 ~ 'y' %}";
    for body in [
        "big == other",
        "'zz' in big",
        "big is eq other",
        "big|upper == 'a'",
        "big.find('y') > 0",
        "big[9999990:] == 'a'",
        "big[-1] == 'a'",
        "(big|length) < 3",
    ] {
        assert_limited(&format!(
            "{big}{{% for i in range(100000) %}}{{% if {body} %}}{{% endif %}}{{% endfor %}}"
        ));
    }
}

#[test]
fn nesting_is_bounded() {
    for wrap in ["[ns.x]", "(ns.x,)", "{'a': ns.x}", "dict(a=ns.x)"] {
        let source = format!(
            "{{% set ns = namespace(x=1) %}}{{% for i in range(100000) %}}{{% set ns.x = {wrap} %}}{{% endfor %}}{{{{ ns.x }}}}"
        );
        assert_limited(&source);
    }
    let sliced = "{% set ns = namespace(x=[1, 2]) %}{% for i in range(100000) %}{% set ns.x = ns.x[0:] %}{% endfor %}{{ ns.x }}";
    assert_eq!(outcome(sliced).unwrap(), "[1, 2]");
}

#[test]
fn a_namespace_cannot_contain_itself() {
    for source in [
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns ~ '' }}",
        "{% set ns = namespace() %}{% set ns.a = {'k': ns} %}{{ ns|tojson }}",
        "{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = b %}{{ a }}",
    ] {
        assert!(matches!(outcome(source), Err(TextError::TemplateRender { .. })), "{source}");
    }
}

#[test]
fn odd_arguments_are_errors_or_text_but_no_panic() {
    for source in [
        "{{ messages[0:5:-1] }}",
        "{{ messages[::0] }}",
        "{{ 'abc'[5:1:-2] }}",
        "{{ 'abc'[9223372036854775807:] }}",
        "{{ 'abc'[-9223372036854775807:9223372036854775807:9223372036854775807] }}",
        "{{ 1 // 0 }}",
        "{{ 1 / 0 }}",
        "{{ 1 % 0 }}",
        "{{ 9223372036854775807 + 9223372036854775807 }}",
        "{{ 170141183460469231731687303715884105727 * 2 }}",
        "{{ range(1, 5, 0) }}",
        "{{ 'a'.split('') }}",
        "{{ nothing * 3 }}",
        "{{ none ~ none }}",
        "{{ 'é'|truncate(1) }}",
        "{{ loop }}",
        "{{ self }}",
        "{{ caller() }}",
        "{% for x in messages recursive %}{{ loop }}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m }}{{ [m] }}{{ m|tojson }}",
        "{{ range }}{{ [range] }}",
        "{{ 1.0e308 * 10 }}{{ (1.0e308 * 10)|tojson }}{{ (1.0e308 * 10)|int }}",
        "{{ '{}'.format() }}",
        "{{ '{0.x.y[z]}'.format(1) }}",
        "{{ '%s'|format() }}",
        "{{ 'x'|indent(-5) }}",
        "{{ 2.5|round(400) }}",
        "{{ [1, 'a', none, {}]|sort }}",
        "{{ {}['a']['b'] }}",
        "{{ messages.items() }}",
        "{{ ''.join(3) }}",
    ] {
        let _either =
            outcome(source).map_err(|error| assert!(!error.to_string().contains("panicked"), "{source}"));
    }
}
