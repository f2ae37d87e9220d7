//! What `cairn demo --check` asks, and what must come: the table.

use Expect::{Echoed, Header, Refused, Route, SeenHeader, SeenPath, SeenProtocol, Share, Status, Version};

use crate::cli::demo::entrance::Place;

/// One line of the table.
pub struct Case {
    /// What it shows.
    pub shows: &'static str,
    /// Where it is asked.
    pub place: Place,
    /// What is asked.
    pub ask: Ask,
    /// What must be true of the answer.
    pub expect: &'static [Expect],
}

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    /// A request over HTTP/1.1 with these headers.
    Http1(&'static str, &'static [(&'static str, &'static str)]),
    /// A request over HTTP/2, without asking for it first.
    Http2(&'static str),
    /// These bytes, then the end.
    Bytes(&'static str),
    /// The same request over HTTP/1.1 so many times.
    Many(&'static str, u32),
}

/// What must be true of an answer.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// Its status.
    Status(u16),
    /// A header of it.
    Header(&'static str, &'static str),
    /// The version that answered.
    Version(&'static str),
    /// What the application was asked for.
    SeenPath(&'static str),
    /// What was spoken with the application.
    SeenProtocol(&'static str),
    /// A header that the application saw.
    SeenHeader(&'static str, &'static str),
    /// The route that decided.
    Route(&'static str),
    /// The same bytes came back.
    Echoed,
    /// There is no answer: the tunnel was refused with this status.
    Refused(u16),
    /// Percentage of answers by this version, give or take.
    Share(&'static str, u32, u32),
}

/// How often the split is tried: with 80 to 20, one in some millions of runs is off by more than 12 percent.
const SPLIT_TRIES: u32 = 300;

/// Everything that is asked.
pub const CASES: &[Case] = &[
    Case {
        shows: "a plain request",
        place: Place::Shop,
        ask: Ask::Http1("/", &[]),
        expect: &[Status(200), SeenPath("/"), SeenProtocol("HTTP/1.1"), Route("everyone")],
    },
    Case {
        shows: "HTTP/2 to an HTTP/1.1 port",
        place: Place::Shop,
        ask: Ask::Http2("/h2"),
        expect: &[Status(200), SeenPath("/h2"), SeenProtocol("HTTP/1.1"), Route("everyone")],
    },
    Case {
        shows: "HTTP/2 all the way",
        place: Place::ShopHttp2,
        ask: Ask::Http2("/h2"),
        expect: &[Status(200), SeenPath("/h2"), SeenProtocol("HTTP/2"), Route("default")],
    },
    Case {
        shows: "80 % to v1, 20 % to v2",
        place: Place::Shop,
        ask: Ask::Many("/", SPLIT_TRIES),
        expect: &[Status(200), Route("everyone"), Share("v1", 80, 12), Share("v2", 20, 12)],
    },
    Case {
        shows: "a header chooses v2",
        place: Place::Shop,
        ask: Ask::Http1("/", &[("x-version", "v2")]),
        expect: &[Status(200), Version("v2"), Route("testers")],
    },
    Case {
        shows: "a path is rewritten, headers are added",
        place: Place::Shop,
        ask: Ask::Http1("/api/cart?id=1", &[]),
        expect: &[
            Status(200),
            Version("v1"),
            SeenPath("/cart?id=1"),
            SeenHeader("x-came-through", "waypoint"),
            Header("x-served-by", "mesh"),
            Route("api"),
        ],
    },
    Case {
        shows: "a page that has moved",
        place: Place::Shop,
        ask: Ask::Http1("/old/page", &[]),
        expect: &[Status(301), Header("location", "http://shop.demo/new/page"), Route("moved")],
    },
    Case {
        shows: "a timeout",
        place: Place::Shop,
        ask: Ask::Http1("/slow", &[]),
        expect: &[Status(504), Route("slow")],
    },
    Case {
        shows: "a route to a service that does not exist",
        place: Place::Shop,
        ask: Ask::Http1("/broken", &[]),
        expect: &[Status(500), Route("broken")],
    },
    Case {
        shows: "bytes on a TCP port",
        place: Place::ShopTcp,
        ask: Ask::Bytes("hello\n"),
        expect: &[Echoed],
    },
    Case {
        shows: "a policy that lets nobody in",
        place: Place::Vault,
        ask: Ask::Http1("/", &[]),
        expect: &[Status(403)],
    },
    Case {
        shows: "an address that is nobody's",
        place: Place::Nobody,
        ask: Ask::Http1("/", &[]),
        expect: &[Refused(503)],
    },
];
