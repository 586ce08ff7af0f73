package meshlib.interop;

import static java.nio.charset.StandardCharsets.UTF_8;

import com.twitter.finagle.Dtab;
import com.twitter.finagle.Failure;
import com.twitter.finagle.FailureFlags;
import com.twitter.finagle.IndividualRequestTimeoutException;
import com.twitter.finagle.ListeningServer;
import com.twitter.finagle.Mux;
import com.twitter.finagle.Mux$param$MaxFrameSize;
import com.twitter.finagle.Path;
import com.twitter.finagle.Service;
import com.twitter.finagle.client.BackupRequestFilter$;
import com.twitter.finagle.context.BackupRequest;
import com.twitter.finagle.context.Contexts;
import com.twitter.finagle.context.Deadline;
import com.twitter.finagle.context.Deadline$;
import com.twitter.finagle.context.Requeues;
import com.twitter.finagle.mux.Request;
import com.twitter.finagle.mux.Requests;
import com.twitter.finagle.mux.Response;
import com.twitter.finagle.mux.Responses;
import com.twitter.finagle.server.ServerInfo;
import com.twitter.finagle.service.TimeoutFilter;
import com.twitter.finagle.tracing.Flags;
import com.twitter.finagle.tracing.SpanId;
import com.twitter.finagle.tracing.Trace;
import com.twitter.finagle.tracing.TraceId;
import com.twitter.finagle.util.DefaultTimer;
import com.twitter.io.Buf;
import com.twitter.io.Buf$ByteArray$Owned$;
import com.twitter.util.Await;
import com.twitter.util.Duration;
import com.twitter.util.Future;
import com.twitter.util.Promise;
import com.twitter.util.StorageUnit;
import com.twitter.util.Time;
import java.io.BufferedReader;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Base64;
import java.util.HexFormat;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.CancellationException;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.logging.Level;
import java.util.logging.LogManager;
import java.util.logging.Logger;
import scala.Option;
import scala.Tuple2;
import scala.collection.immutable.Seq;
import scala.jdk.javaapi.CollectionConverters;
import scala.runtime.AbstractPartialFunction;
import scala.runtime.BoxedUnit;

/**
 * A Finagle Mux server or client that a test drives by lines on standard input and output.
 *
 * <p>Both sides keep Finagle's default stack, so what they put on the wire is what a deployed
 * Finagle process puts there: the wire is the thing under test, not this program.
 */
public final class FinaglePeer {
  private static final Duration GRACE = Duration.fromSeconds(5);
  private static final Duration ANSWER_LIMIT = Duration.fromSeconds(30);
  /** Stands for an empty body, which as base64 would be an invisible word. */
  private static final String EMPTY = "-";

  private static PrintStream out;

  private FinaglePeer() {}

  public static void main(String[] args) throws Exception {
    out = new PrintStream(new FileOutputStream(FileDescriptor.out), true, UTF_8);
    LogManager.getLogManager().reset();
    Logger.getLogger("").setLevel(Level.OFF);
    ServerInfo.initialize(new FixedServerInfo());

    List<String> words = new ArrayList<>(Arrays.asList(args));
    Option<StorageUnit> maxFrame = Option.empty();
    int at = words.indexOf("--max-frame");
    if (at >= 0) {
      words.remove(at);
      maxFrame = Option.apply(StorageUnit.fromBytes(Long.parseLong(words.remove(at))));
    }
    String mode = words.isEmpty() ? "" : words.get(0);
    if (mode.equals("server") && words.size() == 1) {
      serve(maxFrame);
    } else if (mode.equals("client") && words.size() == 2) {
      new ClientLoop(words.get(1), maxFrame).run();
    } else {
      System.err.println("usage: FinaglePeer [--max-frame BYTES] (server | client HOST:PORT)");
      System.exit(2);
    }
    // Finagle's own threads are not all daemons.
    System.exit(0);
  }

  /** Failure messages name the server's id, which by default is the machine's host name. */
  private static final class FixedServerInfo extends ServerInfo {
    @Override
    public Option<String> environment() {
      return Option.empty();
    }

    @Override
    public String id() {
      return "finagle-peer-host";
    }

    @Override
    public String clusterId() {
      return id();
    }

    @Override
    public Option<Object> instanceId() {
      return Option.empty();
    }

    @Override
    public Option<String> zone() {
      return Option.empty();
    }
  }

  // ---- server ------------------------------------------------------------------------------

  private static void serve(Option<StorageUnit> maxFrame) throws Exception {
    // To Java the result of configuring is a supertype: Scala's self types do not survive erasure.
    Mux.Server server = (Mux.Server) Mux.server().withLabel("finagle-peer");
    if (maxFrame.isDefined()) {
      server =
          (Mux.Server) server.configured(new Mux$param$MaxFrameSize(maxFrame.get()).mk());
    }
    ListeningServer listening =
        server.serve(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), new Behaviours());
    out.println("PORT " + ((InetSocketAddress) listening.boundAddress()).getPort());

    BufferedReader in = stdin();
    String line = in.readLine();
    while (line != null && !line.trim().equals("close")) {
      line = in.readLine();
    }
    Await.result(listening.close(GRACE), ANSWER_LIMIT);
    out.println("CLOSED");
  }

  /** What the server does with a request, chosen by the request's destination. */
  private static final class Behaviours extends Service<Request, Response> {
    private final AtomicInteger interrupts = new AtomicInteger();
    private final Map<String, AtomicInteger> attempts = new ConcurrentHashMap<>();
    private volatile String lastInterrupt = "none";

    @Override
    public Future<Response> apply(Request request) {
      String destination = request.destination().show();
      String[] steps = destination.substring(1).split("/");
      switch (steps[0]) {
        case "echo":
          return Future.value(Responses.make(request.contexts(), request.body()));
        case "ctx":
          return text(describe(request));
        case "error":
          return Future.exception(new Exception(utf8(request.body())));
        case "nack":
          return Future.exception(Failure.rejected("nacked by /nack"));
        case "flaky":
          return flaky(request, destination, Integer.parseInt(steps[1]));
        case "nonretryable":
          return Future.exception(
              Failure.apply(
                  "rejected for good by /nonretryable",
                  FailureFlags.NonRetryable() | FailureFlags.Rejected()));
        case "never":
          return never();
        case "interrupts":
          return text(steps.length > 1 ? lastInterrupt : Integer.toString(interrupts.get()));
        case "sleep":
          return DefaultTimer.getInstance()
              .doLater(
                  Duration.fromMilliseconds(Long.parseLong(steps[1])),
                  () -> Responses.make(request.body()));
        default:
          return Future.exception(new IllegalArgumentException("no behaviour at " + destination));
      }
    }

    /** Nacks the first {@code times} requests to this destination, then answers like /ctx. */
    private Future<Response> flaky(Request request, String destination, int times) {
      int attempt =
          attempts.computeIfAbsent(destination, key -> new AtomicInteger()).incrementAndGet();
      return attempt <= times
          ? Future.exception(Failure.rejected("nacked by /flaky"))
          : text(describe(request));
    }

    private Future<Response> never() {
      Promise<Response> pending = new Promise<>();
      pending.setInterruptHandler(
          new AbstractPartialFunction<Throwable, BoxedUnit>() {
            @Override
            public boolean isDefinedAt(Throwable cause) {
              return true;
            }

            @Override
            public BoxedUnit apply(Throwable cause) {
              lastInterrupt = failureLine(cause);
              interrupts.incrementAndGet();
              return BoxedUnit.UNIT;
            }
          });
      return pending;
    }

    private static Future<Response> text(String text) {
      return Future.value(Responses.make(buf(text.getBytes(UTF_8))));
    }

    private static String describe(Request request) {
      StringBuilder text = new StringBuilder();
      line(text, "body", request.body().length());
      line(text, "dest", request.destination().show());
      line(text, "dtab", Dtab.local().show());

      line(text, "trace", Trace.hasId() ? "set" : "unset");
      if (Trace.hasId()) {
        TraceId id = Trace.id();
        line(text, "traceIdHigh", orUnset(id.traceIdHigh()));
        line(text, "traceId", id.traceId());
        line(text, "spanId", id.spanId());
        line(text, "parentId", orUnset(id._parentId()));
        line(text, "sampled", orUnset(id.getSampled()));
        line(text, "flags", id.flags().toLong());
      }

      Option<Deadline> deadline = Deadline.current();
      line(text, "deadline", deadline.isDefined() ? "set" : "unset");
      if (deadline.isDefined()) {
        line(text, "deadlineMs", deadline.get().remaining().inMilliseconds());
        line(
            text,
            "deadlineSpanMs",
            deadline.get().deadline().diff(deadline.get().timestamp()).inMilliseconds());
      }
      Option<Requeues> requeues = Requeues.current();
      line(text, "retries", requeues.isDefined() ? requeues.get().attempt() : "unset");
      line(text, "backup", BackupRequest.wasInitiated());

      for (Tuple2<Buf, Buf> pair :
          CollectionConverters.asJava(Contexts.broadcast().marshal())) {
        line(text, "context." + utf8(pair._1()), hex(pair._2()));
      }
      for (Tuple2<Buf, Buf> pair : CollectionConverters.asJava(request.contexts())) {
        line(text, "header." + utf8(pair._1()), utf8(pair._2()));
      }
      return text.toString();
    }

    private static void line(StringBuilder text, String key, Object value) {
      text.append(key).append('=').append(value).append('\n');
    }

    private static String orUnset(Option<?> option) {
      return option.isDefined() ? option.get().toString() : "unset";
    }
  }

  // ---- client ------------------------------------------------------------------------------

  /** Answers each command line with one line; commands run one after the other. */
  private static final class ClientLoop {
    private final Service<Request, Response> service;
    private final Random random = new Random(42);

    ClientLoop(String address, Option<StorageUnit> maxFrame) {
      Mux.Client client = Mux.client();
      if (maxFrame.isDefined()) {
        client =
            (Mux.Client) client.configured(new Mux$param$MaxFrameSize(maxFrame.get()).mk());
      }
      service = client.newService(address, "finagle-peer-client");
    }

    void run() throws Exception {
      out.println("READY");
      BufferedReader in = stdin();
      for (String line = in.readLine(); line != null; line = in.readLine()) {
        String[] words = line.trim().split(" +");
        if (words[0].isEmpty()) {
          continue;
        }
        if (words[0].equals("close")) {
          break;
        }
        out.println(answer(words));
      }
      Await.result(service.close(GRACE), ANSWER_LIMIT);
      out.println("CLOSED");
    }

    private String answer(String[] words) {
      try {
        switch (words[0]) {
          case "call":
            return outcome(service.apply(request(words, 1)));
          case "deadline":
            return outcome(withinDeadline(Long.parseLong(words[1]), request(words, 2)));
          case "dtab":
            return outcome(underDtab(Dtab.read(words[1]), request(words, 2)));
          case "trace":
            return outcome(traced(traceId(words), request(words, 4)));
          case "all":
            return outcome(everything(words));
          case "headers":
            return outcome(service.apply(withHeaders(words[1], request(words, 2))));
          case "cancel":
            return outcome(
                interrupted(
                    new CancellationException("cancelled by the test"),
                    Long.parseLong(words[1]),
                    request(words, 2)));
          case "supersede":
            return outcome(
                interrupted(
                    Failure.ignorable(BackupRequestFilter$.MODULE$.SupersededRequestFailureWhy()),
                    Long.parseLong(words[1]),
                    request(words, 2)));
          case "parallel":
            return parallel(Integer.parseInt(words[1]), Integer.parseInt(words[2]), words[3]);
          case "status":
            return "OK " + service.status();
          default:
            return "BAD unknown command " + words[0];
        }
      } catch (ArrayIndexOutOfBoundsException e) {
        return "BAD too few words";
      } catch (RuntimeException e) {
        return "BAD " + oneLine(e.toString());
      }
    }

    /**
     * A positive limit is both a request timeout of this client and the deadline it sends.
     * Otherwise only a deadline that has already passed is sent, and this client waits for the
     * answer.
     */
    private Future<Response> withinDeadline(long millis, Request request) {
      Duration limit = Duration.fromMilliseconds(millis);
      if (millis > 0) {
        return new TimeoutFilter<Request, Response>(
                limit,
                new IndividualRequestTimeoutException(limit),
                DefaultTimer.getInstance())
            .apply(request, service);
      }
      Time now = Time.now();
      return Contexts.broadcast()
          .let(
              Deadline$.MODULE$,
              new Deadline(now.minus(Duration.fromSeconds(1)), now.plus(limit)),
              () -> service.apply(request));
    }

    private Future<Response> underDtab(Dtab dtab, Request request) {
      return Dtab.unwind(
          () -> {
            Dtab.setLocal(dtab);
            return service.apply(request);
          });
    }

    private Future<Response> traced(TraceId id, Request request) {
      return Trace.letId(id, false, () -> service.apply(request));
    }

    /** all MILLIS DTAB TRACE SPAN PARENT DEST BODY: every context of the other commands at once. */
    private Future<Response> everything(String[] words) {
      TraceId id = traceId(Arrays.copyOfRange(words, 2, words.length));
      return Dtab.unwind(
          () -> {
            Dtab.setLocal(Dtab.read(words[2]));
            return Trace.letId(
                id,
                false,
                () -> withinDeadline(Long.parseLong(words[1]), request(words, 6)));
          });
    }

    private Future<Response> interrupted(Throwable cause, long millis, Request request) {
      Future<Response> response = service.apply(request);
      DefaultTimer.getInstance()
          .doLater(
              Duration.fromMilliseconds(millis),
              () -> {
                response.raise(cause);
                return BoxedUnit.UNIT;
              });
      return response;
    }

    private String parallel(int count, int size, String destination) {
      List<byte[]> bodies = new ArrayList<>();
      List<Future<Response>> responses = new ArrayList<>();
      for (int i = 0; i < count; i++) {
        byte[] body = new byte[size];
        random.nextBytes(body);
        bodies.add(body);
        responses.add(service.apply(Requests.make(Path.read(destination), buf(body))));
      }
      for (int i = 0; i < count; i++) {
        try {
          Buf reply = Await.result(responses.get(i), ANSWER_LIMIT).body();
          if (!reply.equals(buf(bodies.get(i)))) {
            return "BAD reply " + i + " differs from what was sent";
          }
        } catch (Exception e) {
          return "ERR " + failureLine(e);
        }
      }
      return "OK " + count;
    }

    private static String outcome(Future<Response> response) {
      try {
        Response reply = Await.result(response, ANSWER_LIMIT);
        StringBuilder line = new StringBuilder("OK ").append(base64(reply.body()));
        for (Tuple2<Buf, Buf> pair : CollectionConverters.asJava(reply.contexts())) {
          line.append(' ').append(base64(pair._1())).append(',').append(base64(pair._2()));
        }
        return line.toString();
      } catch (Exception e) {
        return "ERR " + failureLine(e);
      }
    }

    private static Request request(String[] words, int at) {
      String body = words[at + 1];
      byte[] bytes = body.equals(EMPTY) ? new byte[0] : Base64.getDecoder().decode(body);
      return Requests.make(Path.read(words[at]), buf(bytes));
    }

    /** Adds the application headers of {@code key=value,key=value}. */
    private static Request withHeaders(String headers, Request request) {
      List<Tuple2<Buf, Buf>> pairs = new ArrayList<>();
      for (String header : headers.split(",")) {
        String[] pair = header.split("=", 2);
        pairs.add(new Tuple2<>(buf(pair[0].getBytes(UTF_8)), buf(pair[1].getBytes(UTF_8))));
      }
      Seq<Tuple2<Buf, Buf>> contexts = CollectionConverters.asScala(pairs).toSeq();
      return Requests.make(request.destination(), contexts, request.body());
    }

    /** Reads TRACE SPAN PARENT, in hexadecimal, after the first word; 32 digits make 128 bits. */
    private static TraceId traceId(String[] words) {
      String trace = words[1];
      int split = Math.max(0, trace.length() - 16);
      return TraceId.apply(
          Option.apply(spanId(trace.substring(split))),
          Option.apply(spanId(words[3])),
          spanId(words[2]),
          Option.apply(true),
          Flags.apply(),
          split == 0 ? Option.empty() : Option.apply(spanId(trace.substring(0, split))),
          false);
    }

    private static SpanId spanId(String hex) {
      return SpanId.apply(Long.parseUnsignedLong(hex, 16));
    }
  }

  // ---- text --------------------------------------------------------------------------------

  private static BufferedReader stdin() {
    return new BufferedReader(new InputStreamReader(System.in, UTF_8));
  }

  /** The exception's class, its failure flags in decimal (0 without), and its message. */
  private static String failureLine(Throwable t) {
    long flags = t instanceof FailureFlags ? ((FailureFlags<?>) t).flags() : 0;
    return t.getClass().getName() + " " + flags + " " + oneLine(String.valueOf(t.getMessage()));
  }

  private static String oneLine(String text) {
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r");
  }

  private static Buf buf(byte[] bytes) {
    return Buf$ByteArray$Owned$.MODULE$.apply(bytes);
  }

  private static byte[] bytes(Buf buf) {
    return Buf$ByteArray$Owned$.MODULE$.extract(buf);
  }

  private static String utf8(Buf buf) {
    return new String(bytes(buf), UTF_8);
  }

  private static String hex(Buf buf) {
    return HexFormat.of().formatHex(bytes(buf));
  }

  private static String base64(Buf buf) {
    return buf.isEmpty() ? EMPTY : Base64.getEncoder().encodeToString(bytes(buf));
  }
}
