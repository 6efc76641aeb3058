package operate_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nkeys"
)

// login is one way of people to log in to NATS.
type login struct {
	conf string   // of the server, beside its JetStream
	env  []string // of the worker
	bad  []string // the same, refused
	hush string   // never shown
	home string   // has contexts of the nats command, which want the server's address
}

func TestWorkerAndCommandsLogInAsPeopleDo(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(t *testing.T) login{
		"user": byUser, "token": byToken, "nkey": byNKey, "creds": byCreds, "tls": byTLS, "context": byContext,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := prepare(t)
			url := natsWith(t, l.conf)
			s := newSite(t, 0)
			s.env = append(s.env[1:], l.env...)
			if l.home == "" {
				s.env = append(s.env, "NATS_URL="+url)
			} else {
				l.writeContexts(t, url)
			}
			p := spawn(t, s.env, "run", "--set", "worker.name=logged-in")
			p.stderr.awaitText(t, "worker started")
			out, _ := call(t, s.env, 0, nil, "status", "--json")
			if !strings.Contains(out, "logged-in") {
				t.Errorf("status does not show the worker:\n%s", out)
			}
			p.signal(syscall.SIGTERM)
			if code := p.wait(); code != 0 {
				t.Errorf("run: exit %d", code)
			}
			refused := spawn(t, append(s.env, l.bad...), "status")
			if code := refused.wait(); code != 1 && code != 78 {
				t.Errorf("wrong login: exit %d\n%s", code, refused.stderr)
			}
			if all := p.stderr.String() + out + refused.stderr.String(); l.hush != "" && strings.Contains(all, l.hush) {
				t.Errorf("the secret is shown:\n%s", all)
			}
		})
	}
}

func natsWith(t *testing.T, conf string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "server.conf")
	text := fmt.Sprintf("listen: 127.0.0.1:-1\njetstream { store_dir: %q }\n%s\n", t.TempDir(), conf)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatal(err)
	}
	o.NoSigs, o.NoLog = true, true
	s, err := server.NewServer(o)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(patience) {
		t.Fatal("NATS does not start")
	}
	return fmt.Sprintf("nats://127.0.0.1:%d", s.Addr().(*net.TCPAddr).Port)
}

func byUser(*testing.T) login {
	return login{
		conf: `authorization { user: ann, password: "sesame-open" }`, hush: "sesame",
		env: []string{"AVATAR_NATS_USER=ann", "AVATAR_NATS_PASSWORD=sesame-open"},
		bad: []string{"AVATAR_NATS_USER=ann", "AVATAR_NATS_PASSWORD=sesame-shut"},
	}
}

func byToken(*testing.T) login {
	return login{
		conf: `authorization { token: "sesame-open" }`, hush: "sesame",
		env: []string{"AVATAR_NATS_TOKEN=sesame-open"}, bad: []string{"AVATAR_NATS_TOKEN=sesame-shut"},
	}
}

func byNKey(t *testing.T) login {
	user, stranger := newKey(t, nkeys.CreateUser), newKey(t, nkeys.CreateUser)
	return login{
		conf: fmt.Sprintf("authorization { users: [{ nkey: %s }] }", user.public), hush: user.seed,
		env: []string{"NATS_NKEY=" + write(t, "user.nk", user.seed)}, bad: []string{"NATS_NKEY=" + write(t, "stranger.nk", stranger.seed)},
	}
}

func byCreds(t *testing.T) login {
	operator, system, account, user := newKey(t, nkeys.CreateOperator), newKey(t, nkeys.CreateAccount), newKey(t, nkeys.CreateAccount), newKey(t, nkeys.CreateUser)
	stranger := newKey(t, nkeys.CreateUser)
	limits := `"limits":{"subs":-1,"data":-1,"payload":-1,"imports":-1,"exports":-1,"wildcards":true,"conn":-1,"leaf":-1,"mem_storage":-1,"disk_storage":-1,"streams":-1,"consumer":-1}`
	conf := fmt.Sprintf("operator: %s\nsystem_account: %s\nresolver: MEMORY\nresolver_preload: { %s: %s, %s: %s }",
		token(t, operator, operator, `"type":"operator","version":2`), system.public,
		system.public, token(t, operator, system, `"type":"account","version":2,"limits":{"subs":-1,"data":-1,"payload":-1,"imports":-1,"exports":-1,"wildcards":true,"conn":-1,"leaf":-1}`),
		account.public, token(t, operator, account, `"type":"account","version":2,`+limits))
	creds := func(k, signed keyPair) string {
		return fmt.Sprintf("-----BEGIN NATS USER JWT-----\n%s\n------END NATS USER JWT------\n\n-----BEGIN USER NKEY SEED-----\n%s\n------END USER NKEY SEED------\n",
			token(t, account, signed, `"type":"user","version":2,"subs":-1,"data":-1,"payload":-1`), k.seed)
	}
	return login{
		conf: conf, hush: user.seed,
		env: []string{"NATS_CREDS=" + write(t, "user.creds", creds(user, user))},
		bad: []string{"NATS_CREDS=" + write(t, "stranger.creds", creds(stranger, user))},
	}
}

func byContext(t *testing.T) login {
	home := t.TempDir()
	return login{
		conf: `authorization { user: ann, password: "sesame-open" }`, hush: "sesame", home: home,
		env: []string{"XDG_CONFIG_HOME=" + home, "NATS_CONTEXT=good"}, bad: []string{"NATS_CONTEXT=bad"},
	}
}

// writeContexts writes what `nats context save` does.
func (l login) writeContexts(t *testing.T, url string) {
	t.Helper()
	for name, password := range map[string]string{"good": "sesame-open", "bad": "sesame-shut"} {
		writeAt(t, filepath.Join(l.home, "nats", "context", name+".json"),
			fmt.Sprintf(`{"url":%q,"user":"ann","password":%q}`, url, password))
	}
}

func byTLS(t *testing.T) login {
	ca, caKey := certificate(t, "ca", nil, nil)
	serverCert, serverKey := certificate(t, "server", ca, caKey)
	clientCert, clientKey := certificate(t, "client", ca, caKey)
	strangeCA, _ := certificate(t, "strange", nil, nil)
	caFile := write(t, "ca.pem", pemOf("CERTIFICATE", ca.Raw))
	cert, key := write(t, "client.pem", pemOf("CERTIFICATE", clientCert.Raw)), write(t, "client-key.pem", keyPEM(t, clientKey))
	return login{
		conf: fmt.Sprintf("tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }",
			write(t, "server.pem", pemOf("CERTIFICATE", serverCert.Raw)), write(t, "server-key.pem", keyPEM(t, serverKey)), caFile),
		env: []string{"NATS_CERT=" + cert, "NATS_KEY=" + key, "NATS_CA=" + caFile},
		bad: []string{"NATS_CERT=" + cert, "NATS_KEY=" + key, "NATS_CA=" + write(t, "strange.pem", pemOf("CERTIFICATE", strangeCA.Raw))},
	}
}

func certificate(t *testing.T, name string, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: ca == nil,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := template, key
	if ca != nil {
		parent, signer = ca, caKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func pemOf(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func keyPEM(t *testing.T, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pemOf("EC PRIVATE KEY", der)
}

// keyPair is an nkey.
type keyPair struct {
	nkeys.KeyPair
	public, seed string
}

func newKey(t *testing.T, create func() (nkeys.KeyPair, error)) keyPair {
	t.Helper()
	pair, err := create()
	if err != nil {
		t.Fatal(err)
	}
	public, err := pair.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	seed, err := pair.Seed()
	if err != nil {
		t.Fatal(err)
	}
	return keyPair{pair, public, string(seed)}
}

// token is a JWT as nsc makes them: the issuer says who the subject is.
func token(t *testing.T, issuer, subject keyPair, nats string) string {
	t.Helper()
	claims := fmt.Sprintf(`{"jti":"id","iat":%d,"iss":%q,"name":"test","sub":%q,"nats":{%s}}`, time.Now().Unix(), issuer.public, subject.public, nats)
	if !json.Valid([]byte(claims)) {
		t.Fatalf("no JSON: %s", claims)
	}
	coded := base64.RawURLEncoding.EncodeToString
	text := coded([]byte(`{"typ":"JWT","alg":"ed25519-nkey"}`)) + "." + coded([]byte(claims))
	signature, err := issuer.Sign([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + coded(signature)
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	writeAt(t, file, text)
	return file
}

func writeAt(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
