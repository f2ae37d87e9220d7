//! Expressions against the record of an exchange, and bad ones.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::{CelError, Constant, Failure, LONGEST, Options, Program, Syntax};
use crate::{
    Exchange,
    format::{Kind, Value as Formatted, View, tests::finished},
};

fn exchange() -> Exchange {
    let mut exchange = finished();
    let head = exchange.request.as_mut().unwrap();
    for value in ["a", "b"] {
        head.headers.append("x-list", http::HeaderValue::from_static(value));
    }
    let claims = json!({"iss": "issuer", "groups": ["dev", "ops"], "level": 3, "nested": {"a": null, "b": true}});
    exchange.metadata.set("jwt".into(), "payload".into(), Arc::new(claims));
    exchange.filter_state.set("mine".into(), "text".to_owned(), false);
    exchange
}

fn parse(text: &str) -> Result<Program, CelError> {
    Program::parse(text, Options::ALL)
}

/// The value in words, or the failure.
fn result(text: &str) -> String {
    let exchange = exchange();
    let program = parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
    program.explain(&View::new(&exchange)).result
}

#[track_caller]
fn all_hold(texts: &[&str]) {
    for text in texts {
        assert_eq!(result(text), "true", "{text}");
    }
}

#[track_caller]
fn all_fail(failure: Failure, texts: &[&str]) {
    for text in texts {
        assert_eq!(result(text), failure.to_string(), "{text}");
    }
}

#[test]
fn attributes_are_read_off_the_record() {
    for (text, value) in [
        ("request.path", r#""/get?x=1&y=a%20b""#),
        ("request.url_path", r#""/get""#),
        ("request.query", r#""x=1&y=a%20b""#),
        ("request.host", r#""httpbin:8000""#),
        ("request.scheme", r#""http""#),
        ("request.method", r#""GET""#),
        ("request.useragent", r#""curl/7.82.0-DEV""#),
        ("request.id", r#""200efb6c-82be-4760-8ab6-7b6af588d4fb""#),
        ("request.protocol", r#""HTTP/1.1""#),
        ("request.time", "2022-04-01T03:23:12.736Z"),
        ("request.duration", "1.5ms"),
        ("request.size", "0"),
        ("request.headers['user-agent']", r#""curl/7.82.0-DEV""#),
        ("request.headers['User-Agent']", r#""curl/7.82.0-DEV""#),
        ("request.headers.empty", r#""""#),
        ("request.headers['x-list']", r#""a,b""#),
        ("request.headers[':path']", r#""/get?x=1&y=a%20b""#),
        ("request.headers['host']", r#""httpbin:8000""#),
        ("response.code", "200"),
        ("response.code_details", r#""via_upstream""#),
        ("response.flags", "0"),
        ("response.grpc_status", "2"),
        ("response.size", "605"),
        ("response.headers['x-envoy-upstream-service-time']", r#""3""#),
        ("response.headers[':status']", r#""200""#),
        ("connection.id", "7"),
        ("connection.mtls", "false"),
        ("connection.requested_server_name", r#""""#),
        ("source.address", r#""10.244.0.5:41616""#),
        ("source.port", "41616"),
        ("destination.address", r#""10.96.1.10:80""#),
        ("destination.port", "80"),
        ("upstream.address", r#""envoy://connect_originate/10.244.0.31:8080""#),
        ("upstream.local_address", r#""envoy://internal_client_address/""#),
        ("upstream.request_attempt_count", "1"),
        ("xds.cluster_name", r#""inbound-vip|80|http|web.app.svc.cluster.local""#),
        ("xds.route_name", r#""default""#),
        ("xds.filter_chain_name", r#""inbound-vip|80|http|web""#),
        ("metadata.filter_metadata['jwt']['payload']['iss']", r#""issuer""#),
        ("metadata.filter_metadata.jwt.payload.groups", r#"["dev","ops"]"#),
        ("metadata.filter_metadata.jwt.payload.level", "3"),
        ("filter_state['mine']", r#"b"text""#),
        (
            "filter_state['io.istio.peer_principal']",
            r#"b"spiffe://cluster.local/ns/app/sa/client""#,
        ),
        ("filter_state.downstream_peer.namespace", r#""app""#),
        ("filter_state['upstream_peer'].workload", r#""web""#),
    ] {
        assert_eq!(result(text), value, "{text}");
    }
    all_fail(
        Failure::NotThere,
        &[
            "request.none",
            "request.referer",
            "request.headers['none']",
            "request.headers['not a name']",
            "response.headers['x-other']",
            "response.trailers['grpc-status']",
            "response.backend_latency",
            "connection.tls_version",
            "connection.uri_san_peer_certificate",
            "upstream.port",
            "metadata.filter_metadata['none']",
            "metadata.filter_metadata.jwt.payload.none",
            "filter_state['none']",
            "filter_state.downstream_peer.labels['app']",
            "xds.virtual_host_name",
        ],
    );
}

#[test]
fn operators_and_functions_are_cels() {
    all_hold(&[
        "1 + 2 * 3 == 7 && (1 + 2) * 3 == 9",
        "7 / 2 == 3 && -7 / 2 == -3 && 7 % 3 == 1 && -7 % 3 == -1",
        "1 == 1.0 && 1u == 1 && 1 != 1.5 && 1 < 1.5 && 2u > 1",
        "9223372036854775807 > 9223372036854775806",
        "-9223372036854775808 < 0",
        "!false && !!true && - -1 == 1",
        "1 != 'a' && 'a' != b'a' && null == null && null != false",
        "'a' < 'b' && b'a' < b'b' && false < true",
        "true ? true : 1 / 0 == 1",
        "false || true || 1 / 0 == 0",
        "(1 / 0 == 0 || true) && !(1 / 0 == 0 && false)",
        "'b' in ['a', 'b'] && !(1 in []) && 1.0 in [1] && 'x' in {'x': 1}",
        "{'x': 1, 2: 3}['x'] == 1 && {'x': 1, 2: 3}[2] == 3 && {'a': {'b': 1}}.a.b == 1",
        "{'a': 1, 'b': [1, 2]} == {'b': [1, 2.0], 'a': 1u}",
        "[1, 2][1] == 2 && [[1], [2]] == [[1], [2]] && [1] != [1, 2]",
        "metadata.filter_metadata.jwt.payload.groups == ['dev', 'ops']",
        "'ops' in metadata.filter_metadata.jwt.payload.groups",
        "metadata.filter_metadata.jwt.payload.nested == {'a': null, 'b': true}",
        "metadata.filter_metadata.jwt.payload.groups[1] == 'ops'",
        "has(request.headers.empty) && !has(request.headers.none) && has(request.path) && !has(request.referer)",
        "has({'a': 1}.a) && !has({'a': 1}.b)",
        "'user-agent' in request.headers && !('none' in request.headers) && 'mine' in filter_state",
        "size('日本') == 2 && 'abc'.size() == 3 && size(b'日本') == 6 && size([1, 2]) == 2 && {'a': 1}.size() == 1",
        "request.headers.size() == 8",
        "'abc'.startsWith('ab') && 'abc'.endsWith('bc') && 'abc'.contains('b') && 'abc'.contains('') && !'a'.contains('ab')",
        "startsWith('abc', 'ab') && contains('abc', 'c')",
        "'abc'.matches('b') && matches('abc', '^a.c$') && !'abc'.matches('^b')",
        "request.path.matches('^/get[?]x=[0-9]+')",
        "int('12') == 12 && int(1.9) == 1 && int(-1.9) == -1 && uint(3) == 3u && double('1.5') == 1.5",
        "int(timestamp('1970-01-01T00:01:00Z')) == 60",
        "string(12) == '12' && string(1.5) == '1.5' && string(true) == 'true' && string(b'a') == 'a' && bytes('a') == b'a'",
        "string(duration('90s')) == '1m30s' && string(timestamp('2026-01-02T03:04:05.5Z')) == '2026-01-02T03:04:05.5Z'",
        "string(1e10) == '1e+10' && string(0.00001234) == '1.234e-05' && string(123456.0) == '123456' && string(-0.5) == '-0.5'",
        "string(duration('1500us')) == '1.5ms' && string(duration('-1h0.25s')) == '-1h0.25s' && string(duration('0')) == '0'",
        "'a' + 'b' == 'ab' && 'a,b'.split(',') == ['a', 'b'] && ['a', 'b'].join('-') == 'a-b'",
        "'AbC'.lowerAscii() == 'abc' && 'aba'.replace('a', 'x', 1) == 'xba' && ' a '.trim() == 'a'",
        "type(1) == int && type('a') == string && type(type(1)) == type && type(1) != uint",
        "type(request.time) == google.protobuf.Timestamp && type(null) == null_type && type([]) == list",
        "dyn(1) == 1 && bool('true')",
        "duration('1h30m') == duration('5400s') && duration('-1.5s') < duration('0') && duration('1ms') > duration('1us')",
        "timestamp('2026-01-02T03:04:05Z') + duration('1h') == timestamp('2026-01-02T04:04:05Z')",
        "timestamp('2026-01-02T00:00:00Z') - timestamp('2026-01-01T00:00:00Z') == duration('24h')",
        "timestamp('2026-01-02T03:04:05+01:00').getHours() == 2",
        "timestamp('2026-01-02T03:04:05.678Z').getFullYear() == 2026",
        "timestamp('2026-01-02T03:04:05.678Z').getMonth() == 0 && timestamp('2026-01-02T03:04:05Z').getDate() == 2",
        "timestamp('2026-01-04T00:00:00Z').getDayOfWeek() == 0 && timestamp('2026-01-04T00:00:00Z').getDayOfYear() == 3",
        "timestamp('2026-01-02T23:04:05Z').getHours('+02:00') == 1 && timestamp('2026-01-02T03:04:05Z').getHours('UTC') == 3",
        "duration('3661s').getHours() == 1 && duration('3661s').getMinutes() == 61 && duration('1.5s').getMilliseconds() == 500",
        "request.time < timestamp('2030-01-01T00:00:00Z')",
        "0x1F == 31 && 1e3 == 1000.0 && .5 == 0.5 && 0x10u == 16u",
        r"'\x41\u00e9\U0001F600\101\n' == 'Aé😀A\n' && r'\n' != '\n' && b'\xff' != b'\xfe' && br'\x' == b'\\x'",
        "'''a\n'b''' == \"a\\n'b\" // said twice",
    ]);
}

/// What Envoy 1.40 wrote for `%CEL(…)%` and `%TYPED_CEL(…)%`.
#[test]
fn values_are_written_as_envoy_writes_them() {
    let exchange = exchange();
    let view = View::new(&exchange);
    let text = |value: Formatted<'_>| {
        let mut out = Vec::new();
        value.write(&mut out);
        match value.kind() {
            Kind::Absent => "-".to_owned(),
            Kind::Text | Kind::Raw => String::from_utf8(out).unwrap(),
        }
    };
    for (expression, plain, typed) in [
        ("request.method", "GET", "GET"),
        ("request.size", "0", "0"),
        ("response.grpc_status", "2", "2"),
        ("request.headers['none']", "-", "-"),
        ("filter_state['mine']", "text", "dGV4dA=="),
        (
            "metadata.filter_metadata.jwt.payload.groups",
            "CelList value",
            r#"["dev","ops"]"#,
        ),
        ("metadata.filter_metadata.jwt.payload.level", "3", "3"),
        ("connection.requested_server_name", "", ""),
        ("null", "NULL", "-"),
        ("true", "true", "true"),
        ("1.5", "1.5", "1.5"),
        ("1e10", "1e+10", "10000000000"),
        ("0.00001234", "1.234e-05", "0.00001234"),
        ("123456789.0", "1.23457e+08", "123456789"),
        ("duration('90s')", "1m30s", "90s"),
        ("duration('1500us')", "1.5ms", "0.001500s"),
        ("duration('-1h0.25s')", "-1h0.25s", "-3600.250s"),
        ("duration('0')", "0", "0s"),
        (
            "timestamp('2026-01-02T03:04:05.5Z')",
            "2026-01-02T03:04:05.5+00:00",
            "2026-01-02T03:04:05.500Z",
        ),
        (
            "timestamp('2026-01-02T03:04:05Z')",
            "2026-01-02T03:04:05+00:00",
            "2026-01-02T03:04:05Z",
        ),
        (
            "timestamp('2026-01-02T00:00:00Z') - timestamp('2026-01-01T00:00:00Z')",
            "24h",
            "86400s",
        ),
        ("[1, 2]", "CelList value", "[1,2]"),
        ("{'a': 1}", "CelMap value", r#"{"a":1}"#),
        ("type(1)", "CelType value", "-"),
        ("b'abc'", "abc", "YWJj"),
        ("request", "CelMap value", "{}"),
        ("1 / 0", "-", "-"),
        ("1 / 0 == 1 || true", "true", "true"),
        ("'path' in request", "true", "true"),
        ("filter_state.mine == 'text'", "false", "false"),
        ("'a' < 1", "-", "-"),
        ("-7 / 2", "-3", "-3"),
        ("-7 % 3", "-1", "-1"),
    ] {
        let program = parse(expression).unwrap();
        assert_eq!(text(program.format(&view)), plain, "{expression}");
        assert_eq!(text(program.format_typed(&view)), typed, "{expression}");
    }
}

#[test]
fn what_fails_is_no_value() {
    all_fail(Failure::DivisionByZero, &["1 / 0", "1 % 0", "1u / 0u"]);
    all_fail(
        Failure::OutOfRange,
        &[
            "9223372036854775807 + 1",
            "-9223372036854775808 - 1",
            "-9223372036854775808 / -1",
            "-9223372036854775808 % -1",
            "9223372036854775807 * 2",
            "0u - 1u",
            "uint(-1)",
            "int(1e300)",
            "int(0.0 / 0.0)",
            "timestamp('9999-12-31T23:59:59Z') + duration('1s')",
            "duration('99999999999999h')",
        ],
    );
    all_fail(
        Failure::NoOverload,
        &[
            "1 + 1u",
            "1 < 'a'",
            "'a' && true",
            "1 ? 2 : 3",
            "!1",
            "-'a'",
            "size(1)",
            "'a'.startsWith(1)",
            "1 in 2",
            "request.path.size",
            "b'a' + b'b'",
            "request < 1",
        ],
    );
    all_fail(
        Failure::Conversion,
        &[
            "int('x')",
            "timestamp('now')",
            "duration('1')",
            "duration('1.2.3s')",
            "string(b'\\xff')",
        ],
    );
    all_fail(Failure::UnknownName, &["nothing", "nothing.at.all", "nothing == 1 || false"]);
    all_fail(Failure::RepeatedKey, &["{'a': 1, 'a': 2}"]);
    all_fail(
        Failure::NotThere,
        &[
            "[1][1]",
            "{'a': 1}['b']",
            "has(request.none.deeper)",
            "request.headers.none == 'a' || false",
        ],
    );
    let long = format!("'{}'.replace('', '{}')", "a".repeat(1_000), "b".repeat(1_000));
    assert_eq!(result(&long), Failure::TooLong.to_string());
}

#[test]
fn a_condition_holds_only_if_it_is_true() {
    let exchange = exchange();
    let view = View::new(&exchange);
    for (text, holds) in [
        ("request.method == 'GET'", true),
        ("request.method == 'POST'", false),
        ("request.none == 'GET'", false),
        ("request.none != 'GET'", false),
        ("'true'", false),
        ("1", false),
    ] {
        assert_eq!(parse(text).unwrap().holds(&view), holds, "{text}");
    }
}

#[test]
fn what_is_no_expression_is_refused_with_its_place() {
    for (text, position) in [
        ("", 0),
        ("1 +", 3),
        ("(1", 2),
        ("1 2", 2),
        ("a.", 2),
        ("[1, 2", 5),
        ("{1 2}", 3),
        ("'abc", 0),
        ("'a\nb'", 0),
        (r"'\q'", 1),
        (r"'\ud800'", 1),
        (r"b'\u0041'", 2),
        ("1e", 0),
        ("99999999999999999999", 0),
        ("9223372036854775808", 0),
        ("a ? b", 5),
        ("a & b", 2),
        ("for", 0),
        ("in", 0),
        ("has(a)", 0),
        ("has(a.b, c.d)", 0),
        ("Foo{a: 1}", 3),
        ("é", 0),
    ] {
        match parse(text) {
            Err(CelError::Syntax { position: told, .. }) => assert_eq!(told, position, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn what_envoy_does_not_run_is_refused() {
    let refused = |text: &str| Program::parse(text, Options::default()).unwrap_err();
    for text in [
        "[1].all(x, x > 0)",
        "request.headers.exists(h, h == 'a')",
        "[1].map(x, x)",
        "[1].filter(x, true)",
    ] {
        assert_eq!(refused(text), CelError::Comprehension, "{text}");
    }
    for text in [
        "nothing(1)",
        "size()",
        "size(1, 2)",
        "'a'.startsWith()",
        "timestamp()",
        "'a'.string()",
    ] {
        assert!(matches!(refused(text), CelError::UnknownFunction { .. }), "{text}");
    }
    for text in ["string(1)", "'a'.lowerAscii()", "'a'.replace('a', 'b')"] {
        assert!(matches!(refused(text), CelError::Off(_)), "{text}");
    }
    assert!(matches!(refused("'a'.matches('(')"), CelError::Regex(_)));
    // An operator that is off is a failure of the moment, as in Envoy.
    let joined = Program::parse("'a' + 'b' == 'ab'", Options::default()).unwrap();
    assert!(!joined.holds(&View::new(&exchange())));
    for text in [
        "request.path.matches(request.headers['x'])",
        "re.extract('a', 'b', 'c')",
        "request.time.getHours('Europe/Berlin')",
    ] {
        assert!(refused(text).is_unsupported(), "{text}");
    }
}

#[test]
fn size_and_depth_are_bounded() {
    let deep = |count: usize| format!("{}1{}", "(".repeat(count), ")".repeat(count));
    assert!(parse(&deep(90)).is_ok());
    for text in [
        deep(5_000),
        "[".repeat(5_000),
        "{1:".repeat(5_000),
        "a?b:".repeat(4_000) + "c",
        "a".to_owned() + &".b".repeat(5_000),
        "a".to_owned() + &"[0]".repeat(5_000),
        vec!["1"; 5_000].join("+"),
        vec!["1"; 2_000].join(" == "),
        "size(".repeat(3_000),
    ] {
        assert_eq!(parse(&text), Err(CelError::TooDeep), "{}", &text[..20]);
    }
    assert_eq!(parse(&" ".repeat(LONGEST + 1)), Err(CelError::TooLong));
    // A long row of alternatives is not deep.
    let row = vec!["request.path=='/x'"; 800].join("||") + "||true";
    assert_eq!(result(&row), "true");
    assert!(parse(&("!".repeat(10_001) + "true")).is_ok());
    // Nor may a tree from elsewhere be.
    let mut tree = Syntax::Constant(Constant::Int(1));
    for _ in 0..200 {
        tree = Syntax::call("-_", vec![tree]);
    }
    assert_eq!(Program::compile(tree, Options::ALL), Err(CelError::TooDeep));
}

#[test]
fn a_program_says_what_the_record_has_not_and_which_answers_fields_it_reads() {
    for (text, lacks) in [
        ("request.path == '/'", &[][..]),
        (
            "xds.node.id == 'a' || upstream.locality.region == 'b'",
            &["xds.node", "upstream.locality"],
        ),
        ("xds['virtual_host_name'] == 'a'", &["xds.virtual_host_name"]),
        ("has(xds.listener_direction)", &["xds.listener_direction"]),
        ("connection.tls_version == ''", &[]),
        ("filter_state[request.path] == b''", &[]),
        ("xds[request.path] == ''", &["an attribute of xds that is chosen by a value"]),
    ] {
        assert_eq!(parse(text).unwrap().unrecorded().collect::<Vec<_>>(), lacks, "{text}");
    }
    let program = parse("response.headers['X-A'] == response.headers.b && has(response.headers.c)").unwrap();
    let names: Vec<_> = program.response_headers().map(|name| name.as_str()).collect();
    assert_eq!(names, ["x-a", "b", "c"]);
}

#[test]
fn a_story_tells_what_was_looked_at() {
    let exchange = exchange();
    let program = parse("request.headers['x-tier'] == 'gold' || size(request.path) > 99 || has(request.referer)").unwrap();
    let story = program.explain(&View::new(&exchange));
    assert!(!story.holds);
    assert_eq!(story.result, "something it asks for is not there");
    assert_eq!(
        story.read,
        [
            (r#"request.headers["x-tier"]"#.to_owned(), None),
            ("request.path".to_owned(), Some(r#""/get?x=1&y=a%20b""#.to_owned())),
            ("request.referer".to_owned(), None),
        ]
    );
}

#[test]
fn an_expression_is_written_as_it_is_read() {
    for text in [
        r#"request.headers["a"] == "b" && !(a || b)"#,
        "(1 + 2) * 3 - -4",
        "a ? b : c ? d : e",
        "(a ? b : c) ? d : e",
        r#"has(a.b) || "x" in [1, 2u, 1.5, null, true]"#,
        r#"{"a": 1, "b": b"\xff"}.a.size()"#,
        "1 - (2 - 3)",
        "a && (b || c) && d",
    ] {
        let read = super::parser::parse(text).unwrap();
        assert_eq!(read.to_string(), text);
    }
}

proptest! {
    #[test]
    fn no_text_is_too_bad(text in r#"([ -~é\n]{0,40}|([abx.()\[\]{}'"?:,!+*/%<>=&|-]|request|headers|\.size\(\)|in|has\(|1u?|0x|1e9| ){0,25})"#) {
        let exchange = exchange();
        if let Ok(program) = parse(&text) {
            let _ = program.explain(&View::new(&exchange));
            // What is written is read as the same.
            let written = program.to_string();
            prop_assert_eq!(parse(&written).map(|again| again.to_string()), Ok(written));
        }
    }
}
