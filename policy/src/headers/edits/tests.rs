use std::sync::Arc;

use cairn_exchange::{Connection, Protocol, RequestHead, Scheme};
use http::{Method, uri::PathAndQuery};

use super::{EditAction, Exchange, HeaderEdit, HeaderEditError, HeaderEdits, HeaderMap, HeaderName, HeaderValue, record_alone};

fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect()
}

fn exchange(fields: &[(&'static str, &'static str)]) -> Exchange {
    let connection = Connection {
        id: 1,
        authority: "10.0.0.1:80".into(),
        local_address: None,
        service_port: 80,
        remote_address: "10.244.0.200:40000".parse().unwrap(),
        peer: None,
        local: None,
        source: None,
        requested_server_name: None,
        opened: cairn_exchange::clock::now(),
    };
    let mut exchange = Exchange::begin(Protocol::Http11, Arc::new(connection), "chain".into(), 1);
    exchange.request = Some(RequestHead {
        method: Method::GET,
        path: PathAndQuery::from_static("/x?y"),
        authority: HeaderValue::from_static("web.app"),
        scheme: Scheme::Http,
        headers: map(fields),
    });
    exchange
}

#[test]
fn each_action_does_what_its_name_says() {
    use EditAction::{AddIfAbsent, AppendOrAdd, OverwriteIfExists, OverwriteOrAdd};
    for (action, before, after) in [
        (AppendOrAdd, &[][..], &["new"][..]),
        (AppendOrAdd, &["old"][..], &["old", "new"][..]),
        (AddIfAbsent, &[][..], &["new"][..]),
        (AddIfAbsent, &["old"][..], &["old"][..]),
        (OverwriteOrAdd, &[][..], &["new"][..]),
        (OverwriteOrAdd, &["old", "older"][..], &["new"][..]),
        (OverwriteIfExists, &[][..], &[][..]),
        (OverwriteIfExists, &["old"][..], &["new"][..]),
    ] {
        let edits = HeaderEdits::new(vec![HeaderEdit::new("X-A", "new", action, false).unwrap()], vec![]);
        let mut headers = HeaderMap::new();
        for value in before {
            headers.append("x-a", HeaderValue::from_static(value));
        }
        assert!(edits.apply_literal(&mut headers));
        assert_eq!(
            headers.get_all("x-a").iter().collect::<Vec<_>>(),
            after,
            "{action:?} {before:?}"
        );
    }
}

#[test]
fn removal_comes_first_then_overwriting_then_appending() {
    let add = vec![
        HeaderEdit::append("x-a", "appended").unwrap(),
        HeaderEdit::set("x-a", "set").unwrap(),
        HeaderEdit::append("x-gone", "again").unwrap(),
    ];
    let edits = HeaderEdits::new(add, vec![HeaderEdits::removal("X-Gone").unwrap()]);
    let mut headers = map(&[("x-gone", "old"), ("x-a", "old")]);
    assert!(edits.apply_literal(&mut headers));
    assert_eq!(headers.get_all("x-a").iter().collect::<Vec<_>>(), ["set", "appended"]);
    assert_eq!(headers["x-gone"], "again");
}

#[test]
fn empty_values_are_written_only_when_they_are_to_be_kept() {
    for keep_empty in [false, true] {
        let edit = HeaderEdit::new("x-a", "%REQ(x-none)%", EditAction::OverwriteOrAdd, keep_empty).unwrap();
        let edits = HeaderEdits::new(vec![edit], vec![]);
        let mut exchange = exchange(&[]);
        edits.apply_to_request(&mut exchange, &record_alone);
        let headers = exchange.request.unwrap().headers;
        assert_eq!(headers.get("x-a").map(HeaderValue::as_bytes), keep_empty.then_some(&b""[..]));
    }
}

#[test]
fn values_are_made_from_the_request_as_it_is_after_removal() {
    let add = vec![
        HeaderEdit::set("x-origin", "%REQ(:authority)%").unwrap(),
        HeaderEdit::set("x-one", "[%REQ(x-two)%]").unwrap(),
        HeaderEdit::set("x-two", "[%REQ(x-one)%]").unwrap(),
        HeaderEdit::set("x-was", "(%REQ(x-gone)%)").unwrap(),
    ];
    let edits = HeaderEdits::new(add, vec![HeaderName::from_static("x-gone")]);
    let mut exchange = exchange(&[("x-one", "1"), ("x-two", "2"), ("x-gone", "3")]);
    edits.apply_to_request(&mut exchange, &record_alone);
    let headers = exchange.request.unwrap().headers;
    assert_eq!(
        headers,
        map(&[("x-one", "[2]"), ("x-two", "[1]"), ("x-origin", "web.app"), ("x-was", "()")])
    );
}

#[test]
fn values_of_an_answer_may_read_its_headers() {
    let edit = HeaderEdit::set("x-copy", "%RESP(x-a)%").unwrap();
    let exchange = exchange(&[]);
    let mut headers = map(&[("x-a", "1")]);
    HeaderEdits::new(vec![edit], vec![]).apply_to_response(&mut headers, &exchange, &record_alone);
    assert_eq!(headers["x-copy"], "1");
}

#[test]
fn what_cannot_stand_in_a_header_becomes_a_space() {
    let edit = HeaderEdit::set("x-a", "one\r\nx-evil: 1").unwrap();
    let mut headers = HeaderMap::new();
    assert!(HeaderEdits::new(vec![edit], vec![]).apply_literal(&mut headers));
    assert_eq!(headers["x-a"], "one  x-evil: 1");
    assert_eq!(headers.len(), 1);
}

#[test]
fn names_and_values_that_make_no_header_are_refused() {
    for (name, value) in [
        (":path", "/"),
        ("Host", "x"),
        ("x a", "1"),
        ("", "1"),
        ("x-a", "%NO_SUCH_OPERATOR%"),
        ("x-a", "%REQ("),
    ] {
        let error = HeaderEdit::set(name, value).unwrap_err();
        let expected = match error {
            HeaderEditError::Pseudo { .. } => name.starts_with(':') || name == "Host",
            HeaderEditError::Name { .. } => name.is_empty() || name.contains(' '),
            HeaderEditError::Format { .. } => name == "x-a",
        };
        assert!(expected, "{name} {value}: {error}");
    }
}
