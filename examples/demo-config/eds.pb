¡
capturedË≤
Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignmentÎ
1inbound-vip|8090|http|shop.demo.svc.cluster.localµ


r1r1-a¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.11:8090
:
istio1
/
workload#!shop-v1-a;demo;shop;v1;Kubernetes"
(
&$127.0.1.11:8090
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.12:8090
:
istio1
/
workload#!shop-v1-b;demo;shop;v1;Kubernetes"
(
&$127.0.1.12:8090
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.13:8090
:
istio1
/
workload#!shop-v2-a;demo;shop;v2;Kubernetes"
(
&$127.0.1.13:8090
connect_originate1inbound-vip|8090|http|shop.demo.svc.cluster.local≥¸
Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignmentµ
2inbound-vip|80|http|shop-v1.demo.svc.cluster.local˛


r1r1-a¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.11:8080
:
istio1
/
workload#!shop-v1-a;demo;shop;v1;Kubernetes"
(
&$127.0.1.11:8080
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.12:8080
:
istio1
/
workload#!shop-v1-b;demo;shop;v1;Kubernetes"
(
&$127.0.1.12:8080
connect_originate2inbound-vip|80|http|shop-v1.demo.svc.cluster.local¸≈
Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment˛
2inbound-vip|80|http|shop-v2.demo.svc.cluster.local«


r1r1-a¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.13:8080
:
istio1
/
workload#!shop-v2-a;demo;shop;v2;Kubernetes"
(
&$127.0.1.13:8080
connect_originate2inbound-vip|80|http|shop-v2.demo.svc.cluster.local‰∞
Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignmentÈ
/inbound-vip|80|http|shop.demo.svc.cluster.localµ


r1r1-a¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.11:8080
:
istio1
/
workload#!shop-v1-a;demo;shop;v1;Kubernetes"
(
&$127.0.1.11:8080
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.12:8080
:
istio1
/
workload#!shop-v1-b;demo;shop;v1;Kubernetes"
(
&$127.0.1.12:8080
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.13:8080
:
istio1
/
workload#!shop-v2-a;demo;shop;v2;Kubernetes"
(
&$127.0.1.13:8080
connect_originate/inbound-vip|80|http|shop.demo.svc.cluster.local˜¬
Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment˚
0inbound-vip|80|http|vault.demo.svc.cluster.local∆


r1r1-a≥Ä
C
#envoy.filters.listener.original_dst

local127.0.1.21:8080
9
istio0
.
workload" vault-a;demo;vault;v1;Kubernetes"
(
&$127.0.1.21:8080
connect_originate0inbound-vip|80|http|vault.demo.svc.cluster.localÊ±
Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignmentÍ
0inbound-vip|9000|tcp|shop.demo.svc.cluster.localµ


r1r1-a¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.11:9000
:
istio1
/
workload#!shop-v1-a;demo;shop;v1;Kubernetes"
(
&$127.0.1.11:9000
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.12:9000
:
istio1
/
workload#!shop-v1-b;demo;shop;v1;Kubernetes"
(
&$127.0.1.12:9000
connect_originate¥Å
C
#envoy.filters.listener.original_dst

local127.0.1.13:9000
:
istio1
/
workload#!shop-v2-a;demo;shop;v2;Kubernetes"
(
&$127.0.1.13:9000
connect_originate0inbound-vip|9000|tcp|shop.demo.svc.cluster.local"Btype.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment*nonce-1