//! Pure decisions about a request: matchers, routes, retries, header edits
