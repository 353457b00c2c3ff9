use shard::settings::*; use shard::core::*; use shard::uring; use std::sync::Arc;
fn main(){
 env_logger_init();
 let a: Vec<String> = std::env::args().collect();
 let ups: Vec<Upstream> = a[2..].iter().map(|u| Upstream{url:u.clone(),authority:u.clone(),base_path:String::new(),addresses:vec![u.parse().unwrap()]}).collect();
 let n=ups.len();
 let s=Arc::new(Settings{connections_max:10000,backlog:4096,ring_depth:1024,buffers:1024,buffer_bytes:4096,notsent_lowat_bytes:16384,spin_us:0,preempt_ms:10,sleep:Sleep::Ring,head:Default::default(),body_bytes_max:64<<20,event_bytes_max:8<<20,lag_high_bytes:65536,lag_low_bytes:16384,retry_bytes_max:262144,pool_idle_max:256,pool_idle_ms:60000,pool_age_ms:0,
 routes:vec![Route{name:"all".into(),path_prefix:"/".into(),upstreams:(0..n).collect(),deadlines:Default::default(),heartbeat_ms:15000,commit_ms:10000,half_close:HalfClose::Leave,event_ids:true}],demo:Default::default(),records:false,unix_time_at_start_s:1_790_000_000,seed:1});
 let l=uring::listen(a[1].parse().unwrap(),4096,16384).unwrap();
 let wake=Arc::new(uring::EventFd::for_ring().unwrap());
 let io=uring::UringIo::new(&s,vec![l],wake).unwrap();
 let mut sh=Shard::new(io,0,s,Arc::new(UpstreamSet{epoch:1,upstreams:ups}));
 loop { sh.turn(Sleepy::Yes).unwrap(); while let Some(_r)=sh.next_report(){} }
}
fn env_logger_init(){}
