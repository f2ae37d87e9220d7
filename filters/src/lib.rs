//! HTTP filters, one file each: live work on a request
