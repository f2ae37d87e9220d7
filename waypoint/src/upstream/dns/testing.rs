//! A DNS server on loopback whose records a test can change.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use hickory_resolver::{
    config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts},
    proto::{
        op::{Message, MessageType, OpCode, ResponseCode},
        rr::{RData, Record, RecordType},
    },
};
use parking_lot::Mutex;
use tokio::{net::UdpSocket, runtime::Handle, task::JoinHandle};

use super::Names;

type Records = HashMap<String, (Vec<IpAddr>, u32)>;

pub(crate) struct Server {
    port: u16,
    records: Arc<Mutex<Option<Records>>>,
    /// Questions so far.
    pub(crate) asked: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = socket.local_addr().unwrap().port();
        let records = Arc::new(Mutex::new(Some(Records::new())));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (known, book) = (records.clone(), asked.clone());
        let task = tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                let Some(query) = Message::from_vec(&buffer[..length]).ok() else {
                    continue;
                };
                let answer = answer(&query, known.lock().as_ref(), &book);
                let _ = socket.send_to(&answer.to_vec().unwrap(), from).await;
            }
        });
        Self {
            port,
            records,
            asked,
            task,
        }
    }

    /// What a name is from now on.
    pub(crate) fn set(&self, name: &str, addresses: &[&str], ttl: u32) {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let mut records = self.records.lock();
        records.get_or_insert_default().insert(format!("{name}."), (addresses, ttl));
    }

    /// Answers nothing but SERVFAIL until the next [`Server::set`].
    pub(crate) fn break_down(&self) {
        *self.records.lock() = None;
    }

    pub(crate) fn names(&self) -> Names {
        let mut connection = ConnectionConfig::udp();
        connection.port = self.port;
        let server = NameServerConfig::new([127, 0, 0, 1].into(), true, vec![connection]);
        let mut options = ResolverOpts::default();
        options.attempts = 1;
        options.timeout = std::time::Duration::from_secs(2);
        Names::asking(
            Handle::current(),
            ResolverConfig::from_parts(None, Vec::new(), vec![server]),
            options,
        )
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn answer(query: &Message, records: Option<&Records>, asked: &Mutex<Vec<String>>) -> Message {
    let mut answer = Message::new(query.metadata.id, MessageType::Response, OpCode::Query);
    answer.metadata.recursion_available = true;
    let Some(question) = query.queries.first() else {
        return answer;
    };
    answer.add_query(question.clone());
    let name = question.name().to_string().to_lowercase();
    asked.lock().push(name.clone());
    let Some(records) = records else {
        answer.metadata.response_code = ResponseCode::ServFail;
        return answer;
    };
    let Some((addresses, ttl)) = records.get(&name) else {
        answer.metadata.response_code = ResponseCode::NXDomain;
        return answer;
    };
    for address in addresses {
        let data = match (address, question.query_type()) {
            (IpAddr::V4(four), RecordType::A) => RData::A((*four).into()),
            (IpAddr::V6(six), RecordType::AAAA) => RData::AAAA((*six).into()),
            _ => continue,
        };
        answer.add_answer(Record::from_rdata(question.name().clone(), *ttl, data));
    }
    answer
}
