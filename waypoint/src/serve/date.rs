//! The `date` of answers, made once a second and thread.

use std::{
    cell::RefCell,
    time::{Duration, SystemTime},
};

use http::HeaderValue;

thread_local! {
    static CACHED: RefCell<(u64, HeaderValue)> = const { RefCell::new((0, HeaderValue::from_static(""))) };
}

/// The value of `date` now (RFC 9110 §5.6.7).
pub fn now() -> HeaderValue {
    let seconds = cairn_exchange::clock::unix_seconds();
    CACHED.with_borrow_mut(|(at, value)| {
        if *at != seconds {
            let text = httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
            *value = HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""));
            *at = seconds;
        }
        value.clone()
    })
}
